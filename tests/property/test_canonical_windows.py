"""Canonical windows: a place has the same bits whichever tile, of any size, asks for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.domain import Grid, Halo, Pass, Region
from pipeline.errors import RegionError
from pipeline.inference import convolution as convolution_module
from pipeline.inference.canonical import CanonicalNetwork
from pipeline.inference.precision import Precision
from pipeline.inference.predictor import Predictor
from pipeline.inference.stage_plan import Needs
from pipeline.models.architecture import Architecture
from pipeline.models.bundle import Bundle, save_bundle
from pipeline.models.chain import Stage
from pipeline.models.frame import Frame
from pipeline.models.fresh import new_bundle
from pipeline.models.receptive_field import reach_of
from pipeline.models.stages import stages_of

FP32 = Precision(name="fp32", channels_last=True, why="")
BF16 = Precision(name="bf16", channels_last=True, why="")

# Backbone, axes, output stride, rates, crop of image pooling.
Key = tuple[str, int, int, tuple[int, ...], tuple[int, ...] | None]
SLIM: Key = ("slim", 2, 4, (2, 4, 6), None)
SLIM_POOLED: Key = ("slim", 2, 8, (1, 2), (72, 40))
SLIM_3D: Key = ("slim", 3, 2, (2, 4), None)
SLIM_3D_POOLED: Key = ("slim", 3, 4, (1,), (28, 20, 12))
RESNET18_POOLED: Key = ("resnet18", 2, 16, (1, 2), (112, 80))

Bundles = Callable[[Key], Bundle]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Untrained bundles, each written once."""

    @cache
    def bundle_of(key: Key) -> Bundle:
        backbone, dims, stride, rates, crop = key
        architecture = Architecture(
            family="v3",
            backbone=backbone,
            dims=dims,
            output_stride=stride,
            rates=rates,
            image_pooling=crop is not None,
        )
        path: Path = tmp_path_factory.mktemp("bundle") / "fresh"
        made = new_bundle(path, architecture=architecture, bands=2, classes=5, seed=3)
        if crop is None:
            return made
        return save_bundle(path, replace(made, crop=crop), made.network().state_dict())

    return bundle_of


def predictor_of(bundle: Bundle, precision: Precision, *, side_px: int) -> Predictor:
    return Predictor(
        bundle,
        device="cpu",
        precision=precision,
        context="window",
        threads=1,
        canonical_px=side_px,
    )


def sweep_of(bundle: Bundle, shape: tuple[int, ...], side: int) -> Pass:
    grid = Grid(shape=shape, tile=(side,) * len(shape), stride=bundle.architecture.output_stride)
    halo = Halo.uniform(0, ndim=len(shape))
    return Pass(case="", name="", grid=grid, reach=reach_of(bundle.network()), crf_halo=halo)


def scene_of(shape: tuple[int, ...]) -> NDArray[np.float32]:
    rng = np.random.default_rng(math.prod(shape))
    # A trend, so that the mean of a window depends on where it lies.
    ramp_S = np.linspace(-1, 1, shape[-1])
    return (rng.normal(size=(2, *shape)) + ramp_S).astype(np.float32)


def within(array: Any, region: Region, outer: Region) -> Any:
    """A part of the last axes; a view."""
    return array[(..., *region.slices(within=outer))]


def predict(predictor: Predictor, sweep: Pass, scored: Region) -> Tensor:
    """Logits of one region, everything outside what it reads being left out."""
    padded = sweep.grid.padded_shape
    read = sweep.reach.read(scored, shape=padded)
    image_CS = within(scene_of(padded), read, Region.whole(padded))
    return predictor.logits(image_CS, Frame.of(read, shape=padded), scored=scored)


def predict_in_tiles(predictor: Predictor, sweep: Pass) -> Tensor:
    padded = sweep.grid.padded_shape
    logits_KS = torch.full((5, *padded), math.nan)
    for tile in sweep.tiles():
        part_KS = within(logits_KS, tile.scored, Region.whole(padded))
        part_KS.copy_(predict(predictor, sweep, tile.scored))
    assert torch.isfinite(logits_KS).all()
    return logits_KS


# Network, scene, side of a window, sides of tiles. Some tiles are so small, and of so many classes,
# that torch upsamples them by another kernel.
CASES = [
    pytest.param(SLIM, (107, 133), 32, (32, 96, 256), id="slim"),
    pytest.param(SLIM_POOLED, (147, 231), 32, (32, 64, 256), id="slim, pooled"),
    pytest.param(SLIM_3D, (9, 59, 71), 16, (16, 32, 96), id="slim 3-D"),
    pytest.param(SLIM_3D_POOLED, (49, 17, 61), 16, (16, 32, 64), id="slim 3-D, pooled"),
    pytest.param(RESNET18_POOLED, (75, 611), 64, (128, 192, 640), id="resnet18, pooled"),
]


@pytest.mark.parametrize("precision", [FP32, BF16], ids=lambda precision: precision.name)
@pytest.mark.parametrize(("key", "shape", "side_px", "tiles"), CASES)
def test_logits_are_the_same_bits_for_any_tile(
    bundles: Bundles,
    key: Key,
    shape: tuple[int, ...],
    side_px: int,
    tiles: tuple[int, ...],
    precision: Precision,
) -> None:
    """Another tile would give another file, and two runs of a region could not be compared."""
    bundle = bundles(key)
    predictor = predictor_of(bundle, precision, side_px=side_px)
    first, *others = (predict_in_tiles(predictor, sweep_of(bundle, shape, t)) for t in tiles)
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.parametrize(
    ("key", "shape", "side_px", "region"),
    [
        (SLIM_POOLED, (147, 231), 32, Region((40, 72), (104, 176))),
        (SLIM_3D, (24, 59, 71), 16, Region((2, 10, 20), (8, 36, 62))),
    ],
    ids=["slim, pooled", "slim 3-D"],
)
def test_a_region_of_interest_has_the_bits_of_the_whole_scene(
    bundles: Bundles, key: Key, shape: tuple[int, ...], side_px: int, region: Region
) -> None:
    """A part computed again, off the grid of tiles and windows, would not fit into its place."""
    bundle = bundles(key)
    predictor = predictor_of(bundle, FP32, side_px=side_px)
    sweep = sweep_of(bundle, shape, 4 * side_px)
    whole_KS = predict_in_tiles(predictor, sweep)
    expected_KS = within(whole_KS, region, Region.whole(sweep.grid.padded_shape))
    assert torch.equal(predict(predictor, sweep, region), expected_KS)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["double", "single"]
)
@pytest.mark.parametrize(("key", "shape", "side_px"), [c.values[:3] for c in CASES])
def test_canonical_windows_agree_with_one_pass(
    bundles: Bundles,
    key: Key,
    shape: tuple[int, ...],
    side_px: int,
    dtype: torch.dtype,
    limit: float,
) -> None:
    """All tiles would agree on a window that is misplaced, or padded twice at the border."""
    bundle = bundles(key)
    network = bundle.network().to(dtype)
    padded = sweep_of(bundle, shape, side_px).grid.padded_shape
    scene_BCS = torch.from_numpy(scene_of(padded)).unsqueeze(0).to(dtype)
    frame = Frame((0,) * len(shape), padded)
    with torch.inference_mode():
        whole_BKS = network.coarse_logits(scene_BCS, frame)
        coarse = Region.whole(tuple(whole_BKS.shape[2:]))
        windows = CanonicalNetwork(stages_of(network), side_px=side_px)
        windows_BKS = windows.coarse_logits(scene_BCS, frame, coarse)
    assert (windows_BKS - whole_BKS).abs().max() <= limit * whole_BKS.std()


def test_windows_anchored_at_the_tile_give_other_bits(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparisons above would pass whatever the windows, and prove nothing.

    With torch's own kernels, whose rounding depends on the place in the window; oneDNN's does not.
    """
    monkeypatch.setattr(convolution_module, "_onednn", lambda: False)

    def anchored_at_the_tile(needs: Needs, stage: Stage) -> Region:
        return needs.regions[stage.name]

    bundle = bundles(RESNET18_POOLED)
    predictor = predictor_of(bundle, FP32, side_px=64)

    def in_tiles() -> Iterator[Tensor]:
        return (predict_in_tiles(predictor, sweep_of(bundle, (75, 611), t)) for t in (128, 640))

    assert torch.equal(*in_tiles())
    monkeypatch.setattr(Needs, "computed", anchored_at_the_tile)
    small, large = in_tiles()
    assert not torch.equal(small, large)
    assert (small - large).abs().max() < 1e-3 * large.std()


@pytest.mark.parametrize("key", [SLIM, SLIM_3D_POOLED, RESNET18_POOLED])
def test_what_a_tile_does_not_need_reaches_nothing_that_it_does(
    bundles: Bundles, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros stand in windows where a tile needs nothing: their bits would be in its logits."""
    bundle = bundles(key)
    predictor = predictor_of(bundle, FP32, side_px=32)
    sweep = sweep_of(bundle, (256, 512) if key[1] == 2 else (96, 96, 96), 32)
    scored = sweep.tile(len(sweep) // 2).scored
    expected_KS = predict(predictor, sweep, scored)
    filled = []

    def nothing(self: Tensor, shape: tuple[int, ...]) -> Tensor:
        filled.append(shape)
        return self.new_full(shape, math.nan)

    monkeypatch.setattr(Tensor, "new_zeros", nothing)
    assert torch.equal(predict(predictor, sweep, scored), expected_KS)
    assert filled


def test_an_input_that_lacks_something_is_refused(bundles: Bundles) -> None:
    """Zeros would stand for what was not read, and the bytes depend on the tile."""
    bundle = bundles(SLIM)
    predictor = predictor_of(bundle, FP32, side_px=32)
    scored = Region((64, 64), (128, 128))
    read = scored.grow(Halo.uniform(32, ndim=2))
    image_CS = np.zeros((2, *read.shape), dtype=np.float32)
    with pytest.raises(RegionError, match=r"canonical windows need .* of the scene"):
        predictor.logits(image_CS, Frame.of(read, shape=(256, 256)), scored=scored)
