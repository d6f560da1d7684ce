"""Two passes of a network in stages against one plain pass over the whole scene."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adapters.memory import MemoryStore
from pipeline.domain import Grid, Halo, Pass, Region, Tile
from pipeline.inference.scene_context import MISSING, SceneSums, sums_layout
from pipeline.inference.stage_plan import coarse_region, feature_region, needs_of, stage_work
from pipeline.inference.staged import StagedNetwork
from pipeline.models.architecture import Architecture
from pipeline.models.deeplab import DeepLab, aspp_width, build_network
from pipeline.models.frame import Frame
from pipeline.models.fresh import spread
from pipeline.models.receptive_field import reach_of
from pipeline.models.scene_mean import GivenMean, OwnMean, block_sums, mean_of, valid_features
from pipeline.models.scene_stages import pooled_by, pooled_chain
from pipeline.models.stages import stages_of

Key = tuple[str, int, int, tuple[int, ...]]
SLIM: Key = ("slim", 2, 4, (2, 4))
SLIM_8: Key = ("slim", 2, 8, (1, 2))
SLIM_3D: Key = ("slim", 3, 4, (1,))
RESNET18: Key = ("resnet18", 2, 16, (1, 2))


def network_of(key: Key, *, dtype: torch.dtype) -> DeepLab:
    backbone, dims, stride, rates = key
    torch.manual_seed(3)
    architecture = Architecture(
        family="v3",
        backbone=backbone,
        dims=dims,
        output_stride=stride,
        rates=rates,
        image_pooling=True,
    )
    network = build_network(architecture, bands=2, classes=3)
    spread(network)
    return network.to(dtype)


def passes_of(network: DeepLab, shape: tuple[int, ...], side: int) -> tuple[Pass, Pass]:
    """The context pass, also of a scene of one tile, and the one after it."""
    stride, ndim = network.architecture.output_stride, len(shape)
    padded = tuple(-(-n // stride) * stride for n in shape)
    tile = tuple(min(side, n) for n in padded)
    none = Halo.uniform(0, ndim=ndim)
    reach = reach_of(network, context="scene")
    grid = Grid(shape=shape, tile=tile, stride=stride)
    sweep = Pass(case="", name="segment", grid=grid, reach=reach, crf_halo=none)
    context, after = sweep.with_context()
    return context, after


def scene_of(sweep: Pass, *, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(sweep.grid.shape))
    shape = sweep.grid.padded_shape
    scene_BCS = torch.randn(1, 2, *shape, generator=generator, dtype=torch.float64)
    # A trend, so that the mean of a part of the scene is another one.
    scene_BCS = scene_BCS + torch.linspace(-2, 2, shape[-1], dtype=torch.float64)
    return scene_BCS.to(dtype).movedim(1, -1).contiguous().movedim(-1, 1)


def cut(array: Tensor, index: tuple[slice, ...]) -> Tensor:
    parts: tuple[Any, ...] = (..., *index)
    return array[parts]


def part_of(scene_BCS: Tensor, tile: Tile) -> Tensor:
    return cut(scene_BCS, tile.read.slices(within=Region.whole(tuple(scene_BCS.shape[2:]))))


def scene_sums(
    network: DeepLab, context: Pass, scene_BCS: Tensor, valid_S: np.ndarray, *, window: int
) -> SceneSums:
    """The first pass."""
    grid, stride = context.grid, context.grid.stride
    shape, _ = sums_layout(grid, aspp_width(network.architecture))
    sums = SceneSums(MemoryStore(shape, dtype="float64", fill=MISSING), grid)
    staged = StagedNetwork(pooled_chain(stages_of(network)), window=window)
    for tile in context.tiles():
        places = feature_region(tile.read, core=tile.scored, stride=stride)
        frame = Frame.of(tile.read, shape=grid.padded_shape)
        with torch.inference_mode():
            features_BCS = staged.coarse_logits(part_of(scene_BCS, tile), frame, places)
        counts_S = valid_features(
            valid_S[tile.core.slices(within=Region.whole(grid.shape))], stride=stride
        )
        sums.write(tile.core, block_sums(features_BCS[0], counts_S, block=sums.block))
    return sums


class MaskedMean(nn.Module):
    """The oracle's pooling: one plain mean over the features that count."""

    def __init__(self, counts_S: np.ndarray) -> None:
        super().__init__()
        self.counts_S = torch.from_numpy(counts_S)

    def forward(self, features_BCS: Tensor, frame: Frame) -> Tensor:
        mean_BC: Tensor = features_BCS[:, :, self.counts_S].mean(dim=2)
        return mean_BC.reshape(*mean_BC.shape, *(1,) * (features_BCS.ndim - 2))


def whole_logits(network: DeepLab, scene_BCS: Tensor, valid_S: np.ndarray | None) -> Tensor:
    """One plain pass: global pooling as the network is written, or over what is valid."""
    shape = tuple(scene_BCS.shape[2:])
    assert network.pool is not None
    before = network.pool[0]
    network.pool_over(None)
    if valid_S is not None:
        counts_S = valid_features(valid_S, stride=network.architecture.output_stride)
        network.pool[0] = MaskedMean(counts_S)
    with torch.inference_mode():
        logits_BKS = network.coarse_logits(scene_BCS, Frame((0,) * len(shape), shape))
    network.pool[0] = before
    return logits_BKS


def worst(
    network: DeepLab,
    shape: tuple[int, ...],
    side: int,
    *,
    valid_S: np.ndarray | None = None,
    window: int = 16,
    layer: GivenMean | None = None,
) -> float:
    """Greatest difference of any tile's logits from the plain pass, in deviations."""
    context, sweep = passes_of(network, shape, side)
    for one in (context, sweep):
        some = [tile for tile in one.tiles() if tile.read.shape != one.grid.padded_shape]
        assert len(some) > 1, "nearly every tile read the whole scene: nothing was compared"
    scene_BCS = scene_of(sweep, dtype=next(network.parameters()).dtype)
    whole_BKS = whole_logits(network, scene_BCS, valid_S)
    used_S = np.ones(shape, dtype=bool) if valid_S is None else valid_S
    if layer is None:
        total = scene_sums(network, context, scene_BCS, used_S, window=window).total
        layer = GivenMean(mean_of(total))
    staged = StagedNetwork(pooled_by(stages_of(network), layer), window=window)
    stride, found = sweep.grid.stride, 0.0
    for tile in sweep.tiles():
        coarse = coarse_region(tile.read, scored=tile.scored, upsample=staged.chain.upsample)
        frame = Frame.of(tile.read, shape=sweep.grid.padded_shape)
        with torch.inference_mode():
            logits_BKS = staged.coarse_logits(part_of(scene_BCS, tile), frame, coarse)
        index = tuple(
            slice(r // stride + a, r // stride + b)
            for r, a, b in zip(tile.read.start, coarse.start, coarse.stop, strict=True)
        )
        found = max(found, float((logits_BKS - cut(whole_BKS, index)).abs().max()))
    return found / float(whole_BKS.std())


CASES = [
    pytest.param(SLIM, (203, 333), 64, id="slim, 64"),
    pytest.param(SLIM, (203, 333), 128, id="slim, 128"),
    pytest.param(SLIM_8, (531, 301), 256, id="slim, stride 8, whole blocks"),
    pytest.param(SLIM_3D, (79, 17, 91), 32, id="slim 3-D, whole blocks"),
    pytest.param(SLIM_3D, (79, 17, 91), 24, id="slim 3-D, 24"),
    pytest.param(RESNET18, (75, 811), 272, id="resnet18"),
]


@pytest.mark.parametrize(("key", "shape", "side"), CASES)
def test_two_passes_agree_with_plain_global_pooling_in_double_precision(
    key: Key, shape: tuple[int, ...], side: int
) -> None:
    """A feature left out, counted twice, or computed with too little around it would show."""
    assert worst(network_of(key, dtype=torch.float64), shape, side) <= 1e-9


@pytest.mark.parametrize(("key", "shape", "side"), [CASES[1], CASES[3], CASES[5]])
def test_two_passes_agree_with_plain_global_pooling_in_single_precision(
    key: Key, shape: tuple[int, ...], side: int
) -> None:
    """A sum in single precision over a large scene would drift."""
    assert worst(network_of(key, dtype=torch.float32), shape, side) <= 1e-4


@pytest.mark.parametrize(
    ("key", "shape", "side"), [(SLIM_8, (203, 333), 64), (SLIM_3D, (33, 17, 59), 24)]
)
def test_what_is_not_valid_does_not_count(key: Key, shape: tuple[int, ...], side: int) -> None:
    """The black corners of a satellite scene would pull the mean of all of it."""
    valid_S = np.ones(shape, dtype=bool)
    corner = tuple(slice(0, n // 2) for n in shape)
    valid_S[corner] = False
    valid_S[..., -side - 3 :] = False
    network = network_of(key, dtype=torch.float64)
    assert worst(network, shape, side, valid_S=valid_S) <= 1e-9
    network.pool_over(None)
    _, sweep = passes_of(network, shape, side)
    scene_BCS = scene_of(sweep, dtype=torch.float64)
    masked_BKS, plain_BKS = (whole_logits(network, scene_BCS, v) for v in (valid_S, None))
    assert (masked_BKS - plain_BKS).abs().max() > 1e-2 * plain_BKS.std()


def test_a_mean_over_one_tile_is_seen() -> None:
    """The comparison above would pass whatever the mean, and prove nothing."""
    network = network_of(SLIM_8, dtype=torch.float64)
    context, _ = passes_of(network, (203, 333), 64)
    scene_BCS, valid_S = scene_of(context, dtype=torch.float64), np.ones((203, 333), dtype=bool)
    sums = scene_sums(network, context, scene_BCS, valid_S, window=16)
    first_C = sums.read(context.grid.core(0)).sum(axis=(1, 2))
    assert worst(network, (203, 333), 64, layer=GivenMean(mean_of(first_C))) > 1e-2


@pytest.mark.parametrize(("key", "shape"), [(SLIM_8, (90, 77)), (SLIM_3D, (21, 30, 17))])
def test_one_pass_gives_the_bits_of_two_where_the_scene_is_one_tile(
    key: Key, shape: tuple[int, ...]
) -> None:
    """Features that stay where they are would mean another thing than those read twice."""
    network = network_of(key, dtype=torch.float32)
    stride, chain = network.architecture.output_stride, stages_of(network)
    padded = tuple(-(-n // stride) * stride for n in shape)
    scene_BCS = torch.randn(1, 2, *padded)
    frame, coarse = (
        Frame((0,) * len(shape), padded),
        Region.whole(tuple(n // stride for n in padded)),
    )
    counts_S = np.random.default_rng(0).random(coarse.shape) < 0.7
    own = OwnMean(valid_S=counts_S, block=(3,) * len(shape))
    with torch.inference_mode():
        features_CS = StagedNetwork(pooled_chain(chain), window=9).coarse_logits(
            scene_BCS, frame, coarse
        )[0]
        sums_CS = block_sums(features_CS, counts_S, block=own.block)
        given = GivenMean(mean_of(sums_CS.reshape(len(sums_CS), -1).sum(axis=1)))
        one_BKS, two_BKS = (
            StagedNetwork(pooled_by(chain, layer), window=9).coarse_logits(scene_BCS, frame, coarse)
            for layer in (own, given)
        )
    assert torch.equal(one_BKS, two_BKS)


def test_a_mean_that_is_given_costs_no_work_and_the_first_pass_no_head() -> None:
    """The plan would count, and the device do, what nobody needs."""
    network = network_of(RESNET18, dtype=torch.float32)
    chain, whole = stages_of(network.pool_over((64, 64))), Region.whole((640, 640))
    given = pooled_by(chain, GivenMean(np.zeros(256)))
    pointwise = network.pool[1].weight.numel() * 40 * 40

    def work(chain: Any) -> int:
        return stage_work(chain, needs_of(chain, whole, scored=whole, shape=whole.shape))

    assert work(chain) - work(given) == pointwise
    assert pointwise < work(pooled_chain(chain)) < work(given)
