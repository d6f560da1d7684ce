from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.domain import ImageInfo, Region
from pipeline.errors import BundleError, RegionError, SourceError
from pipeline.inference.normalise import normalise
from pipeline.inference.padding import read_padded
from pipeline.models.input_spec import Scaling
from pipeline.ports import Block

Z_SCORE = Scaling(type="z-score", mean=(10.0, 100.0), std=(2.0, 4.0))


class ArraySource:
    """A source that remembers what was read of it."""

    def __init__(self, image_CS: NDArray[Any], valid_S: NDArray[np.bool_]) -> None:
        self.image_CS, self.valid_S = image_CS, valid_S
        self.reads: list[Region] = []

    @property
    def info(self) -> ImageInfo:
        shape = self.valid_S.shape
        axes = ("z", "y", "x")[-len(shape) :]
        channels = tuple(str(n) for n in range(len(self.image_CS)))
        return ImageInfo(
            shape=shape,
            axes=axes,
            channels=channels,
            dtype=str(self.image_CS.dtype),
            nodata=(None,) * len(channels),
            spacing=(1.0,) * len(shape),
            unit="px",
        )

    def read(self, region: Region) -> Block:
        assert region in Region.whole(self.valid_S.shape)
        self.reads.append(region)
        index = region.slices(within=Region.whole(self.valid_S.shape))
        return Block(self.image_CS[(slice(None), *index)], self.valid_S[index])

    def digest(self) -> str:
        return ""


def block_of(image_CS: NDArray[Any], valid_S: NDArray[np.bool_] | None = None) -> Block:
    return Block(image_CS, np.ones(image_CS.shape[1:], bool) if valid_S is None else valid_S)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32", "float64"])
@pytest.mark.parametrize(
    ("scaling", "formula"),
    [
        (Z_SCORE, lambda x, c: (x - (10, 100)[c]) / (2, 4)[c]),
        (Scaling(type="min-max", minimum=(5.0,), maximum=(9.0, 13.0)),
         lambda x, c: (x - 5) / (4, 8)[c]),
        (Scaling(type="offset-scale", offset=(-1.0,), scale=(0.5,)), lambda x, c: x * 0.5 - 1),
        (Scaling(type="clip", minimum=(3.0,), maximum=(90.0,)), lambda x, c: np.clip(x, 3, 90)),
    ],
    ids=["z-score", "min-max", "offset-scale", "clip"],
)  # fmt: skip
def test_every_band_is_scaled_by_its_own_numbers(
    dtype: str, scaling: Scaling, formula: Any
) -> None:
    """A formula, or the order of bands, would differ from what the bundle says."""
    image_CS = np.random.default_rng(0).integers(0, 120, (2, 5, 7)).astype(dtype)
    before = image_CS.copy()
    scaled_CS = normalise(block_of(image_CS), scaling)
    assert scaled_CS.dtype == np.float32
    for c in range(2):
        want_S = formula(image_CS[c].astype(np.float64), c)
        np.testing.assert_allclose(scaled_CS[c], want_S, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(image_CS, before)


def test_invalid_pixels_and_nan_become_exactly_zero() -> None:
    """A NaN or a nodata value of -9999 would spread over the whole halo."""
    image_CS = np.array([[[np.nan, 12, -9999, np.inf]], [[104, np.nan, 1e300, 104]]], np.float64)
    valid_S = np.array([[True, True, False, True]])
    scaled_CS = normalise(Block(image_CS, valid_S), Z_SCORE)
    np.testing.assert_array_equal(scaled_CS, [[[0, 1, 0, 0]], [[1, 0, 0, 1]]])


def test_large_numbers_keep_their_differences() -> None:
    """Elevations or times in int32 would lose their last digits before the mean is taken away."""
    image_CS = np.array([[[2_000_000_001, 2_000_000_003]]], np.int32)
    scaling = Scaling(type="z-score", mean=(2e9,), std=(1.0,))
    np.testing.assert_array_equal(normalise(block_of(image_CS), scaling), [[[1, 3]]])


def test_what_cannot_be_scaled_is_refused() -> None:
    """Complex radar pixels would lose their phase, a third band be scaled by the first's mean."""
    with pytest.raises(SourceError, match="complex64"):
        normalise(block_of(np.zeros((2, 1, 1), np.complex64)), Z_SCORE)
    with pytest.raises(BundleError, match="for 3 bands"):
        normalise(block_of(np.zeros((3, 1, 1))), Z_SCORE)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), ndim=st.sampled_from([2, 3]))
def test_padding_is_numpys_reflection_of_the_whole_scene(data: Any, ndim: int) -> None:
    """A tile would see another border than its neighbour, or than one pass over the scene."""
    shape = tuple(data.draw(st.integers(1, 9)) for _ in range(ndim))
    beyond = tuple(data.draw(st.integers(0, 20)) for _ in range(ndim))
    rng = np.random.default_rng(1)
    source = ArraySource(rng.integers(0, 999, (2, *shape)), rng.random(shape) < 0.7)
    widths = [(0, b) for b in beyond]
    padded_CS = np.pad(source.image_CS, [(0, 0), *widths], mode="reflect")
    padded_S = np.pad(source.valid_S, widths, mode="reflect")
    start = tuple(data.draw(st.integers(0, n - 1)) for n in padded_S.shape)
    stop = tuple(
        data.draw(st.integers(a + 1, n)) for a, n in zip(start, padded_S.shape, strict=True)
    )
    block = read_padded(source, Region(start, stop))
    index = Region(start, stop).slices(within=Region.whole(padded_S.shape))
    np.testing.assert_array_equal(block.image_CS, padded_CS[(slice(None), *index)])
    np.testing.assert_array_equal(block.valid_S, padded_S[index])


def test_padding_reads_only_the_mirrored_part() -> None:
    """A tile at the border would read the whole scene into memory."""
    source = ArraySource(np.zeros((1, 1000, 1000)), np.ones((1000, 1000), bool))
    read_padded(source, Region((960, 100), (1024, 200)))
    read_padded(source, Region((0, 0), (64, 64)))
    assert source.reads == [Region((960, 100), (1000, 200)), Region((0, 0), (64, 64))]


def test_nothing_lies_before_the_scene() -> None:
    """A tile one halo off would be filled with pixels of the opposite side."""
    source = ArraySource(np.zeros((1, 4, 4)), np.ones((4, 4), bool))
    with pytest.raises(RegionError):
        read_padded(source, Region((-1, 0), (3, 4)))
