"""Probabilities averaged in tiles, and over the whole scene."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.domain import Grid, Halo, Pass, Region
from pipeline.inference.average import Average, AveragedPredictor
from pipeline.inference.precision import Precision
from pipeline.inference.predictor import Predictor
from pipeline.models.architecture import Architecture
from pipeline.models.bundle import Bundle
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.frame import Frame
from pipeline.models.fresh import new_bundle, spread
from pipeline.models.receptive_field import reach_of


def network_of(architecture: Architecture, crop: tuple[int, ...]) -> DeepLab:
    """Two bands, three classes, float64."""
    torch.manual_seed(5)
    network = build_network(architecture, bands=2, classes=3)
    spread(network)
    return network.pool_over(crop).double()


def bundle_of(architecture: Architecture, folder: Path) -> Bundle:
    """Two bands, three classes."""
    return new_bundle(folder / "model", architecture=architecture, bands=2, classes=3, seed=1)


def read_region(image_CS: NDArray[Any], frame: Frame) -> Region:
    """Where an image lies that starts at the frame's origin."""
    size = zip(frame.origin, image_CS.shape[1:], strict=True)
    return Region(frame.origin, tuple(a + n for a, n in size))


def scene_of(sweep: Pass) -> NDArray[np.float64]:
    """(2, *S) noise."""
    shape = sweep.grid.padded_shape
    ramp_S = np.linspace(-1, 1, shape[-1])  # so that the mean of a window depends on its place
    return np.random.default_rng(2).normal(size=(2, *shape)) + ramp_S


def worst(
    predictor: AveragedPredictor,
    sweep: Pass,
    wanted: Callable[[NDArray[np.float64]], Tensor],
    numbers: tuple[int, ...],
) -> float:
    """Greatest difference of some tiles from the whole scene, in deviations.

    ``wanted`` gives the (K, *S) logits of the whole scene.
    """
    scene_CS, whole = scene_of(sweep), Region.whole(sweep.grid.padded_shape)
    wanted_KS = wanted(scene_CS)
    parts, found = 0, 0.0
    for number in numbers:
        tile = sweep.tile(number)
        parts += tile.read != whole
        part_CS = scene_CS[(slice(None), *tile.read.slices(within=whole))]
        frame = Frame.of(tile.read, shape=whole.shape)
        logits_KS = predictor.logits(part_CS, frame, scored=tile.scored)
        gap_KS = logits_KS - wanted_KS[(slice(None), *tile.scored.slices(within=whole))]
        found = max(found, float(gap_KS.abs().max()))
    assert parts >= 2, "most tiles read the whole scene: nothing was compared"
    return found / float(wanted_KS.std())


def in_canonical_tiles(
    bundle: Bundle,
    named: str,
    *,
    shape: tuple[int, int],
    side: int,
    precision: Literal["fp32", "bf16"],
) -> Tensor:
    """(K, *S) finite logits of a scene in tiles of ``side`` px, by canonical windows of 64 px."""
    floats = Precision(name=precision, channels_last=True, why="asked")
    average = Average.named(named, own=reach_of(bundle.network()))
    alone = Predictor(
        bundle, device="cpu", precision=floats, context="window", threads=1, canonical_px=64
    )
    predictor, reach = AveragedPredictor(alone, average), average.reach
    grid = Grid(shape=shape, tile=(side, side), stride=reach.stride, endpoint=reach.endpoint)
    none = Halo.uniform(0, ndim=2)
    sweep = Pass(case="", name="", grid=grid, reach=reach, crf_halo=none)
    scene_CS = scene_of(sweep).astype(np.float32)
    whole = Region.whole(grid.padded_shape)
    scene_KS = torch.full((3, *grid.shape), math.nan)
    for tile in sweep.tiles():
        part_CS = scene_CS[(slice(None), *tile.read.slices(within=whole))]
        frame = Frame.of(tile.read, shape=whole.shape)
        logits_KS = predictor.logits(part_CS, frame, scored=tile.core)
        scene_KS[(slice(None), *tile.core.slices(within=whole))] = logits_KS
    assert torch.isfinite(scene_KS).all()
    return scene_KS
