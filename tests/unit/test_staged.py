from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.domain import Grid, Halo, Pass, Region, Tile
from pipeline.inference.stage_plan import coarse_region, stage_work
from pipeline.inference.staged import StagedNetwork
from pipeline.models.architecture import Architecture
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.frame import Frame
from pipeline.models.fresh import spread
from pipeline.models.receptive_field import reach_of
from pipeline.models.stages import stages_of

Key = tuple[str, int, int, tuple[int, ...], tuple[int, ...] | None]

SLIM: Key = ("slim", 2, 4, (2, 4, 6), None)
SLIM_POOLED: Key = ("slim", 2, 8, (1, 2), (72, 40))
SLIM_3D: Key = ("slim", 3, 2, (2, 4), None)
SLIM_3D_POOLED: Key = ("slim", 3, 4, (1,), (28, 20, 12))
RESNET18: Key = ("resnet18", 2, 8, (2, 5), None)
RESNET18_POOLED: Key = ("resnet18", 2, 16, (1, 2), (112, 80))
RESNET50: Key = ("resnet50", 2, 8, (1, 3), None)
RESNET50_POOLED: Key = ("resnet50", 2, 8, (1, 2), (104, 72))


def network_of(key: Key, *, dtype: torch.dtype) -> DeepLab:
    """A fresh network: backbone, axes, output stride, rates, crop of image pooling."""
    backbone, dims, stride, rates, crop = key
    torch.manual_seed(3)
    architecture = Architecture(
        family="v3",
        backbone=backbone,
        dims=dims,
        output_stride=stride,
        rates=rates,
        image_pooling=crop is not None,
    )
    network = build_network(architecture, bands=2, classes=3)
    spread(network)
    return network.pool_over(crop).to(dtype)


def sweep_of(network: DeepLab, shape: tuple[int, ...], side: int) -> Pass:
    stride, ndim = network.architecture.output_stride, len(shape)
    grid = Grid(shape=shape, tile=(side,) * ndim, stride=stride)
    halo = Halo.uniform(0, ndim=ndim)
    return Pass(case="", name="", grid=grid, reach=reach_of(network), crf_halo=halo)


def scene_of(sweep: Pass, *, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(sweep.grid.shape))
    shape = sweep.grid.padded_shape
    scene_BCS = torch.randn(1, 2, *shape, generator=generator, dtype=torch.float64)
    # A trend, so that the mean of a window depends on where it lies.
    return (scene_BCS + torch.linspace(-1, 1, shape[-1], dtype=torch.float64)).to(dtype)


def whole_logits(network: DeepLab, scene_BCS: Tensor) -> Tensor:
    shape = tuple(scene_BCS.shape[2:])
    with torch.inference_mode():
        return network.coarse_logits(scene_BCS, Frame((0,) * len(shape), shape))


def staged_logits(network: DeepLab, scene_BCS: Tensor, tile: Tile, *, window: int) -> Tensor:
    """The logits of a tile, everything outside what it reads being left out."""
    shape, stride = tuple(scene_BCS.shape[2:]), network.architecture.output_stride
    part_BCS = scene_BCS[(..., *tile.read.slices(within=Region.whole(shape)))]
    coarse = coarse_region(tile.read, scored=tile.scored, stride=stride)
    staged = StagedNetwork(stages_of(network), window=window)
    with torch.inference_mode():
        return staged.coarse_logits(part_BCS, Frame.of(tile.read, shape=shape), coarse)


def worst(network: DeepLab, sweep: Pass, *, window: int) -> float:
    """Greatest difference of any tile's logits from one pass over the scene, in deviations."""
    stride = network.architecture.output_stride
    scene_BCS = scene_of(sweep, dtype=next(network.parameters()).dtype)
    whole_BKS = whole_logits(network, scene_BCS)
    found = 0.0
    for tile in sweep.tiles():
        staged_BKS = staged_logits(network, scene_BCS, tile, window=window)
        local = coarse_region(tile.read, scored=tile.scored, stride=stride)
        index = tuple(
            slice(r // stride + a, r // stride + b)
            for r, a, b in zip(tile.read.start, local.start, local.stop, strict=True)
        )
        found = max(found, float((staged_BKS - whole_BKS[(..., *index)]).abs().max()))
    return found / float(whole_BKS.std())


EXACT = [
    pytest.param(SLIM, (203, 333), 64, 16, id="slim"),
    pytest.param(SLIM, (171, 190), 64, 64, id="windows larger than the tile"),
    pytest.param(SLIM, (90, 77), 128, 3, id="windows shorter than a row, one tile"),
    pytest.param(SLIM_POOLED, (247, 331), 64, 7, id="slim, pooled"),
    pytest.param(SLIM_POOLED, (60, 421), 72, 64, id="slim, pooled, scene lower than its window"),
    pytest.param(SLIM_3D, (9, 59, 71), 32, 8, id="slim 3-D"),
    pytest.param(SLIM_3D_POOLED, (79, 17, 91), 24, 5, id="slim 3-D, pooled"),
    pytest.param(RESNET18, (61, 903), 128, 16, id="resnet18"),
    pytest.param(RESNET18_POOLED, (75, 1011), 128, 10, id="resnet18, stride 16, pooled"),
    pytest.param(RESNET50, (41, 999), 160, 16, id="resnet50"),
    pytest.param(RESNET50_POOLED, (43, 1101), 160, 9, id="resnet50, pooled"),
]


@pytest.mark.parametrize(("key", "shape", "side", "window"), EXACT)
def test_stages_agree_with_one_pass_in_double_precision(
    key: Key, shape: tuple[int, ...], side: int, window: int
) -> None:
    """A window misplaced, a border padded twice, or a map overwritten too early would show."""
    network = network_of(key, dtype=torch.float64)
    assert worst(network, sweep_of(network, shape, side), window=window) <= 1e-9
