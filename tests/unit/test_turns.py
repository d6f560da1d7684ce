from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest
import torch

from pipeline.domain import Grid, Halo, Pass, Region
from pipeline.inference import staged as staged_module
from pipeline.inference.canonical import CanonicalNetwork
from pipeline.inference.feature_map import FeatureMap
from pipeline.inference.map_layout import Layout
from pipeline.inference.row_sums import with_row_sums
from pipeline.inference.stage_plan import Needs, coarse_region, needed_of, needs_of
from pipeline.inference.staged import StagedNetwork
from pipeline.inference.turns import Turns
from pipeline.models.architecture import Architecture
from pipeline.models.chain import Chain, Convolution, Stage
from pipeline.models.deeplab import build_network
from pipeline.models.frame import Frame
from pipeline.models.receptive_field import reach_of
from pipeline.models.stages import stages_of

NETWORKS = {
    "slim": Architecture(
        family="v3", backbone="slim", dims=2, output_stride=4, rates=(2, 4), image_pooling=True
    ),
    "slim 3-D": Architecture(
        family="v3", backbone="slim", dims=3, output_stride=4, rates=(1,), image_pooling=True
    ),
    "resnet50": Architecture(
        family="v3", backbone="resnet50", dims=2, output_stride=8, rates=(1, 3), image_pooling=True
    ),
    "resnet50, far": Architecture(
        family="v3",
        backbone="resnet50",
        dims=2,
        output_stride=8,
        rates=(12, 24, 36),
        image_pooling=True,
    ),
}
WIDEST = "backbone_layer4_2_relu_2"


def sweep_of(name: str, side: int, *, wide: int, pooled: bool = True) -> tuple[Chain, Pass]:
    """A network's stages, and its tiles of a scene that is ``wide`` tiles long on its last axis.

    ``pooled``: over windows of 40 px, else over all of a tile.
    """
    architecture = NETWORKS[name]
    with torch.device("meta"):
        network = build_network(architecture, bands=2, classes=3).eval()
    network.pool_over((40,) * architecture.dims if pooled else None)
    shape = (*(side,) * (architecture.dims - 1), wide * side)
    grid = Grid(shape=shape, tile=(side,) * len(shape), stride=architecture.output_stride)
    halo = Halo.uniform(0, ndim=len(shape))
    reach = reach_of(network, context="window" if pooled else "tile")
    sweep = Pass(case="", name="", grid=grid, reach=reach, crf_halo=halo)
    return stages_of(network), sweep


@pytest.mark.parametrize("kind", ["rows", "canonical", "a mean over the tile"])
@pytest.mark.parametrize(
    ("name", "side", "window"),
    [("slim", 192, 13), ("slim 3-D", 32, 5), ("resnet50", 320, 9)],
    ids=["slim", "slim 3-D", "resnet50"],
)
def test_every_row_is_there_when_it_is_read(
    name: str, side: int, window: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows make room for others and maps share memory: one that went too early would be computed
    from another's numbers, and canonical windows take zeros for what is not there."""
    chain, sweep = sweep_of(name, side, wide=3, pooled=kind != "a mean over the tile")
    chain = chain.moved(lambda weight: torch.empty_like(weight, device="cpu"))
    marks = {each: float(number) for number, each in enumerate(chain.channels)}

    def fill(
        result: FeatureMap,
        stage: Stage,
        maps: Mapping[str, FeatureMap],
        needs: Needs,
        windows: Iterable[Region],
    ) -> None:
        for part in windows:
            for step, read in stage.reads():
                needed = needed_of(step, part, needs.shapes[read], needs.frame)
                held_BCS = maps[read].view(needed & needs.regions[read])
                assert (held_BCS == marks[read]).all()
            result.view(part & result.region).fill_(marks[stage.name])

    monkeypatch.setattr(staged_module, "_fill", fill)
    shape, tile = sweep.grid.padded_shape, sweep.tile(1)
    network = (
        CanonicalNetwork(chain, side_px=32)
        if kind == "canonical"
        else StagedNetwork(chain, window=window)
    )
    image_BCS = torch.full((1, 2, *tile.read.shape), marks[chain.image])
    coarse = coarse_region(tile.read, scored=tile.scored, upsample=chain.upsample)
    logits_BKS = network.coarse_logits(image_BCS, Frame.of(tile.read, shape=shape), coarse)
    assert (logits_BKS == marks[chain.logits]).all()


def needs_of_inner(
    side: int, *, name: str = "resnet50", pooled: bool = True
) -> tuple[Chain, Needs]:
    """Stages of a network, as tiles run them, and what an inner tile needs of them."""
    chain, sweep = sweep_of(name, side, wide=3, pooled=pooled)
    chain = with_row_sums(chain)
    tile, shape = sweep.tile(1), sweep.grid.padded_shape
    return chain, needs_of(chain, tile.read, scored=tile.scored, shape=shape)


def block_of(side: int, *, pooled: bool = True) -> tuple[int, list[int]]:
    """Numbers of the block for an inner tile of ResNet-50, and of each map in all."""
    chain, needs = needs_of_inner(side, pooled=pooled)
    sizes = [needs.regions[stage.name].size * stage.channels for stage in chain.stages]
    return Layout.of(chain, needs, Turns.of(chain, needs, window=64)).size, sizes


def test_maps_hold_a_part_of_a_large_tile() -> None:
    """Memory would grow with the area of the tile: the widest map of ResNet-50 alone takes 3 GB at
    4096 px. Four times the pixels take twice the memory: that of their width."""
    (small, few), (large, many) = block_of(4096), block_of(8192)
    assert small < 0.27 * max(few)
    assert large < 2.1 * small
    assert large < 0.14 * max(many)


def test_a_map_that_is_summed_by_rows_is_held_for_a_band() -> None:
    """The widest map of ResNet-50 would be held over the reach of ASPP: nine times as high."""
    chain, needs = needs_of_inner(4096, name="resnet50, far")
    turns = Turns.of(chain, needs, window=64)
    bands = [turn.stop - turn.first for turn in turns.order if turn.name == WIDEST]
    assert turns.heights[WIDEST] == max(bands)
    sums = [stage for stage in chain.stages if stage.eager]
    room = sum(turns.heights[stage.name] * stage.channels for stage in sums)
    assert room < 0.65 * (72 + max(bands)) * chain.channels[WIDEST]


@pytest.mark.parametrize("side", [4096, 5000])
def test_a_map_holds_one_band_and_what_its_readers_reach_over(side: int) -> None:
    """Bands of a map that end elsewhere than their readers' bands are held two at a time: half
    as much memory again for all maps of a deep network."""
    chain, needs = needs_of_inner(side)
    turns = Turns.of(chain, needs, window=64)
    bands = {turn.name: turn.stop - turn.first for turn in turns.order[: -len(turns.order) // 2]}
    reaches = dict.fromkeys(turns.heights, 0)
    for stage in chain.stages:
        for step, name in stage.reads():
            if isinstance(step.layer, Convolution):
                slide = step.layer.slide
                reach = slide.dilation[0] * (slide.kernel[0] - 1) + 1 - slide.stride[0]
                reaches[name] = max(reaches[name], reach)
    beside = 4  # what a shortcut waits for, of the branch beside it
    trunk = [name for name in turns.heights if name.startswith("backbone")]
    for name in [chain.image, *trunk]:
        least = bands[name] + max(beside, reaches[name])
        assert turns.heights[name] <= least + max(beside, reaches[name]) // 2


def test_a_mean_over_the_tile_holds_one_map_whole() -> None:
    """What the mean is of must be there to its last row: the maps before it need not be."""
    size, sizes = block_of(4096, pooled=False)
    assert max(sizes) < size < 1.6 * max(sizes)
