from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.domain import Grid, Halo, Pass, Region, Tile
from pipeline.inference.row_sums import with_row_sums
from pipeline.inference.stage_plan import coarse_region
from pipeline.inference.staged import StagedNetwork
from pipeline.models.architecture import Architecture
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.frame import Frame
from pipeline.models.fresh import spread
from pipeline.models.geometry import Scale
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
RESNET101: Key = ("resnet101", 2, 8, (1, 2), None)
RESNET50_POOLED: Key = ("resnet50", 2, 8, (1, 2), (104, 72))
RESNET50_FAR: Key = ("resnet50", 2, 8, (8, 12), None)
RESNET50_FAR_POOLED: Key = ("resnet50", 2, 8, (3, 9), (232, 72))


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Whatever other tests leave: a plain pass of one thread rounds 1x1 convolutions otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


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
    scene_BCS = (scene_BCS + torch.linspace(-1, 1, shape[-1], dtype=torch.float64)).to(dtype)
    # The memory format of the stages: rounding differs between formats.
    return scene_BCS.movedim(1, -1).contiguous().movedim(-1, 1)


def cut(array: Tensor, index: tuple[slice, ...]) -> Tensor:
    """A part of the last axes; a view."""
    parts: tuple[Any, ...] = (..., *index)
    return array[parts]


def whole_logits(network: DeepLab, scene_BCS: Tensor) -> Tensor:
    shape = tuple(scene_BCS.shape[2:])
    with torch.inference_mode():
        return network.coarse_logits(scene_BCS, Frame((0,) * len(shape), shape))


def staged_logits(network: DeepLab, scene_BCS: Tensor, tile: Tile, *, window: int) -> Tensor:
    """The logits of a tile, everything outside what it reads being left out."""
    shape = tuple(scene_BCS.shape[2:])
    part_BCS = cut(scene_BCS, tile.read.slices(within=Region.whole(shape)))
    coarse = coarse_region(tile.read, scored=tile.scored, upsample=Scale.of(network.upsample))
    staged = StagedNetwork(with_row_sums(stages_of(network)), window=window)
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
        local = coarse_region(tile.read, scored=tile.scored, upsample=Scale.of(network.upsample))
        index = tuple(
            slice(r // stride + a, r // stride + b)
            for r, a, b in zip(tile.read.start, local.start, local.stop, strict=True)
        )
        found = max(found, float((staged_BKS - cut(whole_BKS, index)).abs().max()))
    return found / float(whole_BKS.std())


EXACT = [
    pytest.param(SLIM, (203, 333), 64, 16, id="slim"),
    pytest.param(SLIM, (171, 190), 64, 64, id="windows larger than the tile"),
    pytest.param(SLIM, (90, 77), 128, 3, id="windows shorter than a row, one tile"),
    pytest.param(SLIM_POOLED, (247, 331), 64, 7, id="slim, pooled"),
    pytest.param(SLIM_POOLED, (60, 421), 72, 64, id="slim, pooled, scene lower than its window"),
    pytest.param(SLIM_3D, (9, 59, 71), 32, 8, id="slim 3-D"),
    pytest.param(SLIM_3D_POOLED, (79, 17, 91), 24, 5, id="slim 3-D, pooled"),
    pytest.param(RESNET18, (45, 903), 320, 16, id="resnet18"),
    pytest.param(RESNET18_POOLED, (75, 1011), 272, 10, id="resnet18, stride 16, pooled"),
    pytest.param(RESNET50, (25, 803), 272, 16, id="resnet50"),
    pytest.param(RESNET50_POOLED, (27, 901), 320, 9, id="resnet50, pooled"),
    pytest.param(RESNET101, (17, 1303), 272, 16, id="resnet101"),
    pytest.param(RESNET50_FAR, (1003, 25), 320, 5, id="resnet50, summed by rows"),
    pytest.param(RESNET50_FAR, (43, 203), 320, 5, id="summed by rows, lower than the kernel"),
    pytest.param(RESNET50_FAR_POOLED, (803, 25), 400, 3, id="summed by rows, pooled"),
]


@pytest.mark.parametrize(("key", "shape", "side", "window"), EXACT)
def test_stages_agree_with_one_pass_in_double_precision(
    key: Key, shape: tuple[int, ...], side: int, window: int
) -> None:
    """A window misplaced, a border padded twice, or a map overwritten too early would show."""
    network = network_of(key, dtype=torch.float64)
    assert worst(network, sweep_of(network, shape, side), window=window) <= 1e-9


@pytest.mark.parametrize(
    ("key", "shape", "side"),
    [(SLIM, (203, 333), 64), (SLIM_POOLED, (247, 331), 64), (SLIM_3D, (9, 59, 71), 32),
     (RESNET18_POOLED, (75, 1011), 272), (RESNET50, (25, 803), 272),
     (RESNET101, (17, 1303), 272)],
    ids=["slim", "slim, pooled", "slim 3-D", "resnet18, pooled", "resnet50", "resnet101"],
)  # fmt: skip
def test_stages_agree_with_one_pass_in_single_precision(
    key: Key, shape: tuple[int, ...], side: int
) -> None:
    """Arithmetic of the stages' own, such as a folded batch norm, would move a deep network."""
    network = network_of(key, dtype=torch.float32)
    assert worst(network, sweep_of(network, shape, side), window=64) <= 1e-4


def test_atrous_branches_of_a_deep_network_are_summed_by_rows() -> None:
    """Else the tests of sums above would see none, and 72 rows of 2048 channels be held."""
    plain = stages_of(network_of(RESNET50_FAR_POOLED, dtype=torch.float32))
    summed = with_row_sums(plain)
    assert [stage.name for stage in summed.stages if stage.eager] == [
        "classifier_0_convs_3_norm",
        *(f"classifier_0_convs_{branch}_0" for branch in range(3)),
    ]
    work = [sum(stage.work for stage in chain.stages) for chain in (plain, summed)]
    assert work[0] == work[1]


@pytest.mark.parametrize("rows", [True, False], ids=["summed by rows", "as it is"])
def test_wide_maps_are_not_copied_to_be_padded(rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 rows of 2048 channels, the most that a tile of ResNet-50 held, were copied at the scene's
    border for the sake of a few rows of zeros."""
    network = network_of(RESNET50_FAR, dtype=torch.float32)
    chain, shape, padded = stages_of(network), (208, 40), []

    def watched(part_BCS: Tensor, fill: list[int], value: float) -> Tensor:
        padded.append(part_BCS.shape[1])
        return pad(part_BCS, fill, value=value)

    pad = torch.nn.functional.pad
    monkeypatch.setattr(torch.nn.functional, "pad", watched)
    staged = StagedNetwork(with_row_sums(chain) if rows else chain, window=4)
    with torch.inference_mode():
        staged.coarse_logits(
            torch.zeros(1, 2, *shape), Frame((0, 0), shape), Region((0, 0), (26, 5))
        )
    assert set(padded) <= {2, 64, 128}  # those of layers with a stride: image, pool, first halving


@pytest.mark.parametrize("key", [SLIM_POOLED, RESNET18, SLIM_3D_POOLED], ids=lambda key: key[0])
def test_the_same_tile_gives_the_same_bytes(key: Key) -> None:
    """Memory that was not written, or written in another order, would show in a retried tile."""
    network = network_of(key, dtype=torch.float32)
    sweep = sweep_of(network, (50, 130) if key[1] == 2 else (20, 30, 40), 64)
    scene_BCS = scene_of(sweep, dtype=torch.float32)
    first, second = (staged_logits(network, scene_BCS, sweep.tile(0), window=9) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()


@pytest.mark.parametrize(("key", "crop"), [(SLIM, None), (SLIM_POOLED, None), (RESNET18, None)])
def test_a_halo_chosen_short_gives_what_one_pass_over_the_read_region_gives(
    key: Key, crop: None
) -> None:
    """A short halo, and a mean over the tile, would mean another thing than they do elsewhere."""
    network = network_of(key, dtype=torch.float64).pool_over(crop)
    shape, read = (320, 320), Region((64, 128), (256, 320))
    scored = Region((128, 176), (208, 320))
    part_BCS = torch.randn(1, 2, *read.shape, dtype=torch.float64)
    frame = Frame.of(read, shape=shape)
    coarse = coarse_region(read, scored=scored, upsample=Scale.of(network.upsample))
    with torch.inference_mode():
        whole_BKS = network.coarse_logits(part_BCS, frame)
        staged_BKS = StagedNetwork(stages_of(network), window=11).coarse_logits(
            part_BCS, frame, coarse
        )
    index = coarse.slices(within=Region.whole(tuple(whole_BKS.shape[2:])))
    assert (staged_BKS - cut(whole_BKS, index)).abs().max() <= 1e-9 * whole_BKS.std()
