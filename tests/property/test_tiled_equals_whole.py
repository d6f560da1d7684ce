from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pipeline.domain import Grid, Halo, Pass, Region
from pipeline.models.architecture import Architecture
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.frame import Frame
from pipeline.models.fresh import spread
from pipeline.models.receptive_field import reach_of

NETWORKS = {
    "slim": (("slim", 2, 4, (2, 4, 6), False), (512, 512)),
    "slim, stride 8": (("slim", 2, 8, (1, 2), False), (512, 512)),
    "slim 3-D": (("slim", 3, 2, (2, 4, 6), False), (64, 64, 64)),
    "slim 3-D, stride 4": (("slim", 3, 4, (1, 2), False), (64, 64, 64)),
    # Small rates and crops: the scene is wider than the halo and many windows wide.
    "pooled": (("slim", 2, 8, (1, 2), True), (72, 40)),
    "pooled 3-D": (("slim", 3, 4, (1,), True), (28, 20, 12)),
}


def fresh_network(name: str, *, dtype: torch.dtype) -> DeepLab:
    (backbone, dims, stride, rates, pooling), crop = NETWORKS[name]
    torch.manual_seed(5)
    architecture = Architecture(
        family="v3",
        backbone=backbone,
        dims=dims,
        output_stride=stride,
        rates=rates,
        image_pooling=pooling,
    )
    network = build_network(architecture, bands=3, classes=5)
    spread(network)
    return network.pool_over(crop).to(dtype)


def padded_scene(shape: tuple[int, ...], network: DeepLab) -> Tensor:
    padded = Grid(shape=shape, tile=_tile(network, 64), stride=network.architecture.output_stride)
    generator = torch.Generator().manual_seed(math.prod(shape))
    scene_BCS = torch.randn(1, 3, *padded.padded_shape, generator=generator, dtype=torch.float64)
    # A trend, so that the mean of a window depends on where it lies.
    ramp_S = torch.linspace(-1, 1, scene_BCS.shape[-1], dtype=torch.float64)
    return (scene_BCS + ramp_S).to(next(network.parameters()).dtype)


def _tile(network: DeepLab, side: int) -> tuple[int, ...]:
    return (side,) * network.architecture.dims


def predict_in_tiles(network: DeepLab, scene_BCS: Tensor, sweep: Pass) -> tuple[Tensor, int]:
    """All cores side by side, and how many tiles did not read the whole scene."""
    padded = sweep.grid.padded_shape
    whole, parts = Region.whole(padded), 0
    result_KS = torch.full((5, *sweep.grid.shape), math.nan, dtype=scene_BCS.dtype)
    for tile in sweep.tiles():
        parts += tile.read != whole
        part_BCS = scene_BCS[(..., *tile.read.slices(within=whole))]
        with torch.inference_mode():
            logits_KS = network(part_BCS, Frame.of(tile.read, shape=padded))[0]
        kept_KS = logits_KS[(..., *tile.core.slices(within=tile.read))]
        result_KS[(..., *tile.core.slices(within=whole))] = kept_KS
    return result_KS, parts


def compare(name: str, shape: tuple[int, ...], side: int, dtype: torch.dtype) -> float:
    """Greatest difference of tiled and whole logits, in deviations."""
    network = fresh_network(name, dtype=dtype)
    stride, dims = network.architecture.output_stride, network.architecture.dims
    grid = Grid(shape=shape, tile=_tile(network, side), stride=stride)
    crf_halo = Halo.uniform(3, ndim=dims)
    sweep = Pass(case="", name="", grid=grid, reach=reach_of(network), crf_halo=crf_halo)
    scene_BCS = padded_scene(shape, network)
    tiled_KS, parts = predict_in_tiles(network, scene_BCS, sweep)
    assert parts > 1, "every tile read the whole scene: nothing was compared"
    with torch.inference_mode():
        whole_KS = network(scene_BCS, Frame((0,) * dims, grid.padded_shape))[0]
    whole_KS = whole_KS[(..., *(slice(n) for n in shape))]
    return float((tiled_KS - whole_KS).abs().max() / whole_KS.std())


CASES = [
    ("slim", (203, 333), 64),
    ("slim", (333, 190), 100),
    ("slim, stride 8", (205, 301), 64),
    ("slim 3-D", (9, 59, 71), 32),
    ("slim 3-D, stride 4", (70, 13, 79), 24),
    ("pooled", (247, 331), 64),
    ("pooled", (60, 421), 72),
    ("pooled 3-D", (79, 17, 91), 24),
]


@pytest.mark.parametrize(("name", "shape", "side"), CASES)
def test_tiles_agree_with_the_whole_scene_in_double_precision(
    name: str, shape: tuple[int, ...], side: int
) -> None:
    """A halo one pixel short, a shifted window or a border off by one would show at 1e-3."""
    assert compare(name, shape, side, torch.float64) <= 1e-9


@pytest.mark.parametrize(("name", "shape", "side"), [CASES[0], CASES[3], CASES[5]])
def test_tiles_agree_with_the_whole_scene_in_single_precision(
    name: str, shape: tuple[int, ...], side: int
) -> None:
    """An operation whose rounding depends on the tile would show: a running sum, a resize scale."""
    assert compare(name, shape, side, torch.float32) <= 1e-4


def test_a_resnet_with_windowed_pooling_agrees_with_the_whole_scene() -> None:
    """The windows of the real trunk, across whose whole width tiles read, would be misplaced."""
    torch.manual_seed(1)
    architecture = Architecture(
        family="v3", backbone="resnet18", dims=2, output_stride=8, rates=(1, 2), image_pooling=True
    )
    network = build_network(architecture, bands=3, classes=5)
    spread(network)
    network.pool_over((104, 72)).double()
    shape = (70, 611)
    grid = Grid(shape=shape, tile=(128, 128), stride=8)
    sweep = Pass(
        case="", name="", grid=grid, reach=reach_of(network), crf_halo=Halo.uniform(0, ndim=2)
    )
    scene_BCS = padded_scene(shape, network)
    tiled_KS, parts = predict_in_tiles(network, scene_BCS, sweep)
    assert parts >= 3
    with torch.inference_mode():
        whole_KS = network(scene_BCS, Frame((0, 0), grid.padded_shape))[0, :, :70, :611]
        tile_KS = network.pool_over(None)(scene_BCS, Frame((0, 0), grid.padded_shape))
    assert (tiled_KS - whole_KS).abs().max() <= 1e-9 * whole_KS.std()
    assert (tile_KS[0, :, :70, :611] - whole_KS).abs().max() > 1e-3 * whole_KS.std()


def test_a_halo_one_stride_short_is_seen() -> None:
    """The comparison above would pass whatever the halo, and prove nothing."""
    network = fresh_network("slim", dtype=torch.float64)
    reach = reach_of(network)
    seen = []
    for side, axis in itertools.product(("before", "after"), range(2)):
        short = {"before": list(reach.halo.before), "after": list(reach.halo.after)}
        short[side][axis] -= reach.stride
        halo = Halo(tuple(short["before"]), tuple(short["after"]))
        grid = Grid(shape=(256, 224), tile=(96, 96), stride=4)
        sweep = Pass(
            case="",
            name="",
            grid=grid,
            reach=type(reach)(stride=4, halo=halo),
            crf_halo=Halo.uniform(0, ndim=2),
        )
        scene_BCS = padded_scene((256, 224), network)
        tiled_KS, _ = predict_in_tiles(network, scene_BCS, sweep)
        with torch.inference_mode():
            whole_KS = network(scene_BCS, Frame((0, 0), (256, 224)))[0]
        seen.append(float((tiled_KS - whole_KS).abs().max()))
    assert min(seen) > 1e-9
