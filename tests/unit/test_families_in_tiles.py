"""The published families, taken apart and cut into tiles, against one pass of the plain module.

Networks are as published but for what a test has no time for: fewer repeated blocks, small rates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pipeline.domain import Grid, Halo, Pass, Region, Tile
from pipeline.inference.stage_plan import coarse_place, coarse_region
from pipeline.inference.staged import StagedNetwork
from pipeline.models.architecture import Architecture
from pipeline.models.chain import Chain
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.frame import Frame
from pipeline.models.published import published
from pipeline.models.receptive_field import reach_of
from pipeline.models.stages import stages_of


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Narrow maps: threads would cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CROP = (65, 65)
"""The window of image pooling, in px: smaller than the scenes."""


def v3plus(backbone: str, **changes: object) -> Architecture:
    """At stride 16, with rates that keep the scene small."""
    base = published("v3plus", backbone, output_stride=16)
    return replace(base, rates=(1, 2), **changes)  # type: ignore[arg-type]


NETWORKS = {
    "v1": published("v1", "vgg16"),
    "v1, its MSc": replace(published("v1", "vgg16"), multi_scale="features"),
    "v2, VGG-16 and ASPP-L": published("v2", "vgg16"),
    "v2, ResNet-101 at three scales": replace(
        published("v2", "resnet101"), rates=(1, 2), multi_scale="inputs"
    ),
    "v3, multi-grid": replace(published("v3", "resnet50-tf", output_stride=16), rates=(1, 2)),
    "v3, cascade": replace(
        published("v3", "resnet50-tf", output_stride=16),
        rates=(),
        image_pooling=False,
        cascade=1,
        multi_grid=(1, 1, 1),
    ),
    "v3+, ResNet-50": v3plus("resnet50"),
    "v3+, ResNet-50, corners aligned": v3plus("resnet50", align_corners=True),
    "v3+, ResNet-50 of the authors": v3plus("resnet50-tf"),
    "v3+, Xception-41": v3plus("xception41"),
}


def shortened(architecture: Architecture) -> DeepLab:
    """The network without most of the blocks that its trunk repeats, in float64."""
    torch.manual_seed(3)
    network = build_network(architecture, bands=2, classes=3)
    for name, part in network.named_modules():
        if name in ("backbone.layer2", "backbone.layer3", "backbone.layer4"):
            assert isinstance(part, nn.Sequential)
            del part[1:-1]
        if name == "backbone.blocks":  # Xception's middle flow
            assert isinstance(part, nn.Sequential)
            del part[4:10]
    return network.pool_over(CROP).double().eval()


def strip_of(network: DeepLab) -> Pass:
    """Tiles of a scene that is longer than the halo, and a multiple of nothing."""
    reach = reach_of(network)
    side = -(-64 // reach.stride) * reach.stride
    shape = (2 * reach.stride + 3, reach.halo_with_window.largest + 3 * side - 5)
    grid = Grid(shape=shape, tile=(side, side), stride=reach.stride, endpoint=reach.endpoint)
    return Pass(case="", name="", grid=grid, reach=reach, crf_halo=Halo.uniform(0, ndim=2))


def in_a_tile(chain: Chain, scene_BCS: Tensor, tile: Tile) -> Tensor:
    """(1, K, *S) logits of a tile's core, from what it reads alone."""
    shape = tuple(scene_BCS.shape[2:])
    frame = Frame.of(tile.read, shape=shape)
    frame.check(tile.read.shape, stride=chain.stride, endpoint=chain.endpoint)
    coarse = coarse_region(tile.read, scored=tile.core, upsample=chain.upsample)
    part_BCS = scene_BCS[(..., *tile.read.slices(within=Region.whole(shape)))]
    coarse_BKS = StagedNetwork(chain, window=16).coarse_logits(part_BCS, frame, coarse)
    at = coarse.move(coarse_place(frame.origin, upsample=chain.upsample))
    fine_BKS: Tensor = chain.upsample.layer(coarse_BKS.contiguous())
    return fine_BKS[(..., *tile.core.slices(within=chain.upsample.gives(at)))]


@pytest.mark.parametrize("name", NETWORKS)
def test_tiles_of_every_family_agree_with_one_pass(name: str) -> None:
    """A layer of this family would be taken for another, or its tiles read too little."""
    network = shortened(NETWORKS[name])
    sweep, chain = strip_of(network), stages_of(network)
    shape = sweep.grid.padded_shape
    generator = torch.Generator().manual_seed(4)
    scene_BCS = torch.randn(1, 2, *shape, generator=generator, dtype=torch.float64)
    last = sweep.grid.counts[1] - 1
    with torch.inference_mode():
        whole_BKS = network(scene_BCS, Frame((0, 0), shape))
        for number in (0, last):
            tile = sweep.tile(number)
            assert tile.read != Region.whole(shape)
            want_BKS = whole_BKS[(..., *tile.core.slices(within=Region.whole(shape)))]
            gap_BKS = in_a_tile(chain, scene_BCS, tile) - want_BKS
            assert gap_BKS.abs().max() <= 1e-9 * whole_BKS.std()
