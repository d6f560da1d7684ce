"""How many vertices an image touches, against the native engine, which numbers them."""

from __future__ import annotations

import numpy as np
import pytest

from adapters.memory import MemorySource
from pipeline.crf.density import density_of
from pipeline.crf.engine import installed
from pipeline.crf.params import CrfParams, ResolvedCrf
from pipeline.crf.placed_tile import Room
from pipeline.crf.whole_scene import SceneCrf, ScenePixels
from pipeline.domain import Grid, Region
from pipeline.errors import SourceReadError
from pipeline.ports import Block

RNG = np.random.default_rng(3)


def crf(ndim: int) -> ResolvedCrf:
    mapping = {
        "smoothness": {"weight": 3, "position": 3},
        "appearance": {
            "weight": 4, "position": 30, "value": 10, "bands": ["1", "2"], "range": [0, 255],
        },
    }  # fmt: skip
    return CrfParams.from_mapping(mapping).resolve((1.0,) * ndim, unit="px", channels=("1", "2"))


def image(shape: tuple[int, ...]) -> np.ndarray:
    steps_S = np.indices(shape).sum(0) // 9 % 5 * 40
    return (40 + steps_S + RNG.normal(0, 6, (2, *shape))).clip(0, 255).astype(np.uint8)


def numbered(image_CS: np.ndarray, params: ResolvedCrf, start: int, stop: int) -> list[int]:
    """Vertices of each kernel that those rows touch, as C++ finds them."""
    part_CS = image_CS[:, start:stop]
    shape = (stop, *part_CS.shape[2:])
    image_CS = np.zeros((2, *shape), np.uint8)
    image_CS[:, start:] = part_CS
    valid_S = np.zeros(shape, np.bool_)
    valid_S[start:] = True
    scene = SceneCrf(grid=Grid(shape=shape, tile=shape, stride=1), params=params)
    even_KS = np.full((2, *shape), 0.5, np.float32)
    found = ScenePixels(number=0, prob_KS=even_KS, block=Block(image_CS, valid_S))
    return [len(own) for own in scene.tell(scene.place(found, Room(threads=1)), None).own]


@pytest.mark.skipif(not installed("native"), reason="the native CRF engine was not built here")
@pytest.mark.parametrize("shape", [(64, 80), (16, 24, 20)])
def test_vertices_are_those_that_the_engine_numbers(shape: tuple[int, ...]) -> None:
    """The plan would say another memory than is taken, and a node be killed or paid twice."""
    image_CS, params = image(shape), crf(len(shape))
    density = density_of(MemorySource(image_CS), params, tile=shape)
    pixels = np.prod(shape)
    for kernel, wanted in enumerate(numbered(image_CS, params, 0, shape[0])):
        assert density.vertices(kernel) * pixels == pytest.approx(wanted, rel=0.1)
    for rows in (4, 8):
        runs = [numbered(image_CS, params, a, a + rows) for a in range(0, shape[0], rows)]
        for kernel, wanted in enumerate(np.sum(runs, axis=0)):
            assert density.touched(kernel, rows=rows + 1) * pixels == pytest.approx(wanted, rel=0.1)


class Unreadable(MemorySource):
    """Every read fails."""

    def read(self, region: Region) -> Block:
        raise SourceReadError("gone")


def test_noise_is_counted_where_no_place_can_be_read_or_holds_enough() -> None:
    """A plan would fail for what is one tile's trouble, or take a few pixels for an image."""
    image_CS, params = image((90, 90)), crf(2)
    sources = (MemorySource(image_CS), Unreadable(image_CS))
    of_image, of_noise = (density_of(source, params, tile=(90, 90)) for source in sources)
    assert (of_image.places, of_noise.places) == (1, 0)
    assert of_noise.vertices(1) > 3 * of_image.vertices(1)
    assert of_noise.notes
    assert not of_image.notes
    valid_S = np.zeros((90, 90), np.bool_)
    valid_S[0, :3] = True
    assert density_of(MemorySource(image_CS, valid_S=valid_S), params, tile=(90, 90)) == of_noise


def test_the_densest_place_wins() -> None:
    """A tile in the part that is noisy would take more memory than the plan said."""
    image_CS = np.full((2, 900, 900), 100, np.uint8)
    flat = density_of(MemorySource(image_CS), crf(2), tile=(900, 900))
    image_CS[:, 500:, :] = RNG.integers(0, 256, (2, 400, 900))
    half = density_of(MemorySource(image_CS), crf(2), tile=(900, 900))
    noise = density_of(Unreadable(image_CS), crf(2), tile=(900, 900))
    assert flat.vertices(1) < 0.1 * half.vertices(1)
    assert half.vertices(1) > 0.8 * noise.vertices(1)
    assert half.vertices(0) == flat.vertices(0)
