"""Canonical windows of every family: the bits of a tile are those of a larger one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.domain import Grid, Halo, Pass, Region
from pipeline.inference.canonical import BoxMap, CanonicalNetwork, upsampled
from pipeline.inference.stage_plan import coarse_place, coarse_region
from pipeline.models.architecture import Architecture
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.frame import Frame
from pipeline.models.published import published
from pipeline.models.receptive_field import reach_of
from pipeline.models.stages import stages_of

SIDE_PX = 64
"""Of a window: a multiple of 32, which several sizes of the input want."""

FAMILIES: dict[str, Architecture] = {
    "v1, its MSc": replace(published("v1", "vgg16"), multi_scale="features"),
    "v2, three sizes": replace(published("v2", "vgg16"), rates=(1, 2), multi_scale="inputs"),
    "v3+": replace(published("v3plus", "resnet50", output_stride=16), rates=(1, 2)),
    "v3+, corners aligned": replace(published("v3plus", "slim"), align_corners=True),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def tile_logits(network: DeepLab, scene_BCS: Tensor, sweep: Pass, number: int) -> Tensor:
    """(K, *S) of a tile's core, in windows of the scene, from what the tile reads alone."""
    chain, tile, shape = stages_of(network), sweep.tile(number), sweep.grid.padded_shape
    part_BCS = scene_BCS[(..., *tile.read.slices(within=Region.whole(shape)))].contiguous()
    frame, upsample = Frame.of(tile.read, shape=shape), chain.upsample
    coarse = coarse_region(tile.read, scored=tile.core, upsample=upsample)
    windows = CanonicalNetwork(chain, side_px=SIDE_PX)
    logits_BKS = windows.coarse_logits(part_BCS, frame, coarse)
    at = coarse.move(coarse_place(frame.origin, upsample=upsample))
    return upsampled(
        upsample.layer,
        BoxMap(logits_BKS.movedim(1, -1), at, logits_BKS.device),
        tile.core,
        side_px=SIDE_PX,
        shape=shape,
        upsample=upsample,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tile_has_the_bits_of_one_twice_as_long(name: str) -> None:
    """Several resolutions would be cut at windows of their own, and the tile show."""
    torch.manual_seed(3)
    network = build_network(FAMILIES[name], bands=2, classes=3).pool_over((33, 33)).eval()
    reach, none = reach_of(network), Halo.uniform(0, ndim=2)
    shape = (50, 5 * SIDE_PX + 7)
    grids = [
        Grid(shape=shape, tile=(side, side), stride=reach.stride, endpoint=reach.endpoint)
        for side in (SIDE_PX, 2 * SIDE_PX)
    ]
    small, large = (Pass(case="", name="", grid=g, reach=reach, crf_halo=none) for g in grids)
    generator = torch.Generator().manual_seed(4)
    scene_BCS = torch.randn(1, 2, *grids[0].padded_shape, generator=generator)
    with torch.inference_mode():
        part_KS = tile_logits(network, scene_BCS, small, 3)
        whole_KS = tile_logits(network, scene_BCS, large, 1)
    inner = grids[0].core(3).slices(within=grids[1].core(1))
    assert part_KS.std() > 0
    assert torch.equal(part_KS, whole_KS[(slice(None), *inner)])
