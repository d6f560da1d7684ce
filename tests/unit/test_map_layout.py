from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest
import torch

from pipeline.domain import Grid, Halo, Pass, Region
from pipeline.inference import staged as staged_module
from pipeline.inference.canonical import CanonicalNetwork
from pipeline.inference.map_layout import Layout
from pipeline.inference.stage_plan import Needs, coarse_region, needed_of, needs_of
from pipeline.inference.staged import FeatureMap, StagedNetwork
from pipeline.models.architecture import Architecture
from pipeline.models.chain import Chain, Stage
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
}


def sweep_of(name: str, side: int, *, wide: int) -> tuple[Chain, Pass]:
    """A network's stages, and its tiles of a scene that is ``wide`` tiles long on its last axis."""
    architecture = NETWORKS[name]
    with torch.device("meta"):
        network = build_network(architecture, bands=2, classes=3).eval()
    network.pool_over((40,) * architecture.dims)
    shape = (*(side,) * (architecture.dims - 1), wide * side)
    grid = Grid(shape=shape, tile=(side,) * len(shape), stride=architecture.output_stride)
    halo = Halo.uniform(0, ndim=len(shape))
    sweep = Pass(case="", name="", grid=grid, reach=reach_of(network), crf_halo=halo)
    return stages_of(network), sweep


@pytest.mark.parametrize("canonical", [False, True], ids=["rows", "canonical"])
@pytest.mark.parametrize(
    ("name", "side", "window"),
    [("slim", 192, 13), ("slim 3-D", 32, 5), ("resnet50", 320, 9)],
    ids=["slim", "slim 3-D", "resnet50"],
)
def test_no_place_of_a_map_is_written_before_it_was_read_for_the_last_time(
    name: str, side: int, window: int, *, canonical: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps share memory: one that starts too early would be computed from another's numbers."""
    chain, sweep = sweep_of(name, side, wide=3)
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
                assert (maps[read].view(needed & maps[read].region) == marks[read]).all()
            result.view(part & result.region).fill_(marks[stage.name])

    monkeypatch.setattr(staged_module, "_fill", fill)
    shape, tile = sweep.grid.padded_shape, sweep.tile(1)
    network = (
        CanonicalNetwork(chain, side_px=32) if canonical else StagedNetwork(chain, window=window)
    )
    image_BCS = torch.full((1, 2, *tile.read.shape), marks[chain.image])
    coarse = coarse_region(tile.read, scored=tile.scored, upsample=chain.upsample)
    logits_BKS = network.coarse_logits(image_BCS, Frame.of(tile.read, shape=shape), coarse)
    assert (logits_BKS == marks[chain.logits]).all()


def test_a_map_lies_where_the_map_that_it_is_made_from_lay() -> None:
    """A stage that widens the features would take the memory of both: 5.4 GB, where 2.99 are the
    widest map of ResNet-50 over an inner tile of 4096 px, and 3.74 are held with what it reads."""
    chain, sweep = sweep_of("resnet50", 4096, wide=3)
    tile, shape = sweep.tile(1), sweep.grid.padded_shape
    needs = needs_of(chain, tile.read, scored=tile.scored, shape=shape)
    sizes = {stage.name: needs.regions[stage.name].size * stage.channels for stage in chain.stages}
    layout = Layout.of(chain, needs)
    assert max(sizes.values()) < layout.size < 1.35 * max(sizes.values())
    assert all(layout.starts[name] + sizes[name] <= layout.size for name in layout.starts)
