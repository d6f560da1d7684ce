"""Probabilities averaged over sizes of the scene: in tiles as of the scene resized by torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from averages import (
    bundle_of,
    in_canonical_tiles,
    network_of,
    read_region,
    scene_of,
    worst,
)
from numpy.typing import NDArray
from own_networks import Coarse, Hourglass
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.domain import Grid, Halo, Pass, Reach, Region
from pipeline.errors import PlanError
from pipeline.inference.average import Average, AveragedPredictor
from pipeline.inference.precision import Precision
from pipeline.inference.predictor import Predictor
from pipeline.inference.stage_plan import coarse_place, coarse_region
from pipeline.inference.staged import StagedNetwork, WholeNetwork
from pipeline.inference.zoom import Zoom
from pipeline.models.architecture import Architecture
from pipeline.models.custom_architecture import CustomArchitecture
from pipeline.models.custom_network import CustomNetwork
from pipeline.models.custom_reach import custom_reach, probe_custom
from pipeline.models.deeplab import DeepLab
from pipeline.models.frame import Frame
from pipeline.models.geometry import Scale
from pipeline.models.published import published
from pipeline.models.receptive_field import reach_of
from pipeline.models.stages import stages_of

SLIM = published("v3", "slim")
POOLED = replace(SLIM, output_stride=8, rates=(1,), image_pooling=True)
NETWORKS: dict[str, tuple[Architecture, tuple[int, ...]]] = {
    "strides": (SLIM, (64, 64)),
    "corners": (replace(SLIM, align_corners=True), (64, 64)),
    "pooled": (POOLED, (72, 40)),
    "pooled, corners": (replace(POOLED, align_corners=True), (72, 40)),
    "decoder": (published("v3plus", "slim"), (64, 64)),
    "volume": (replace(published("v3", "slim", dims=3), rates=(1, 2)), (16, 16, 16)),
}
OWN = {"as large as the image": Hourglass, "a quarter of it": Coarse}
SIZES = "0.5,0.75,1,1.25,1.5,1.75"

pytestmark = pytest.mark.usefixtures("one_thread")


def own_network(name: str) -> CustomNetwork:
    torch.manual_seed(6)
    module = OWN[name](2, 3)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.3)
    asked = CustomArchitecture(family="custom", dims=2, output_stride=4, entry_point="own:Network")
    return CustomNetwork(module, asked, bands=2, classes=3).eval()


@dataclass(frozen=True)
class Double:
    """``Predictor`` in float64: its floats are those of the device."""

    network: DeepLab | CustomNetwork

    def logits(self, image_CS: NDArray[Any], frame: Frame, *, scored: Region, zoom: Zoom) -> Tensor:
        network, last = self.network, Scale.of(self.network.upsample)
        upsample, end = zoom.upsample(last), int(last.align_corners)
        frame.check(image_CS.shape[1:], stride=zoom.stride(network.stride), endpoint=end)
        read = read_region(image_CS, frame)
        coarse = coarse_region(read, scored=scored, upsample=upsample)
        own = isinstance(network, CustomNetwork)
        runs = WholeNetwork(network) if own else StagedNetwork(stages_of(network), window=8)
        with torch.inference_mode():
            image_BCS = zoom.scale(last).layer(torch.from_numpy(image_CS.copy())[None])
            seen = zoom.frame(frame, like=last)
            seen.check(tuple(image_BCS.shape[2:]), stride=network.stride, endpoint=end)
            logits_BKS = upsample.layer(runs.coarse_logits(image_BCS, seen, coarse).contiguous())
        at = coarse.move(coarse_place(frame.origin, upsample=upsample))
        return logits_BKS[(0, slice(None), *scored.slices(within=upsample.gives(at)))]

    def pooled(self, image_CS: NDArray[Any], frame: Frame, *, core: Region) -> Tensor:
        raise NotImplementedError


def sweep_of(reach: Reach, *, ndim: int) -> Pass:
    shape = (75, 391) if ndim == 2 else (11, 7, 71)
    side = 32 if ndim == 2 else 16
    grid = Grid(shape=shape, tile=(side,) * ndim, stride=reach.stride, endpoint=reach.endpoint)
    return Pass(
        case="", name="", grid=grid, reach=reach, crf_halo=Halo.uniform(5 * (ndim == 2), ndim=ndim)
    )


def mean_by_torch(
    network: DeepLab | CustomNetwork, scene_CS: NDArray[np.float64], sizes: str, flips: Any = ((),)
) -> Tensor:
    """(K, *S) logarithm of the mean of the softmax of scores, all resized by torch: the oracle."""
    scene_BCS, parts = torch.from_numpy(scene_CS)[None], []
    corners, end = network.align_corners, int(network.align_corners)
    mode = {4: "bilinear", 5: "trilinear"}[scene_BCS.ndim]
    for factor in map(Fraction, sizes.split(",")):
        for axes in flips:
            dims = [2 + axis for axis in axes]
            size = [int((n - end) * factor) + end for n in scene_BCS.shape[2:]]
            image_BCS = F.interpolate(
                scene_BCS.flip(dims), size=size, mode=mode, align_corners=corners
            )
            with torch.inference_mode():
                scores_BKS = network.coarse_logits(image_BCS, Frame((0,) * len(size), tuple(size)))
            fine_BKS = F.interpolate(
                scores_BKS, size=scene_BCS.shape[2:], mode=mode, align_corners=corners
            )
            parts.append(fine_BKS.softmax(1).flip(dims)[0])
    return torch.stack(parts).mean(0).log()


def gap(network: DeepLab | CustomNetwork, average: Average, wanted: Any, reach: Reach) -> float:
    """Greatest difference of some tiles from the whole scene, in deviations."""
    sweep = sweep_of(reach, ndim=network.architecture.dims)
    numbers = (0, len(sweep) // 2 + 1, len(sweep) - 1)
    return worst(AveragedPredictor(Double(network), average), sweep, wanted, numbers)


@pytest.mark.parametrize("name", NETWORKS)
def test_tiles_agree_with_a_scene_that_torch_resizes(name: str) -> None:
    """A resized tile would lie beside its place in the resized scene, or read too little."""
    network = network_of(*NETWORKS[name])
    sizes = SIZES if name in ("strides", "pooled, corners") else "0.5,1.25"
    average = Average.named(f"scale:{sizes}", own=reach_of(network))

    def wanted(scene_CS: NDArray[np.float64]) -> Tensor:
        return mean_by_torch(network, scene_CS, sizes)

    assert gap(network, average, wanted, average.reach) <= 1e-9


@pytest.mark.parametrize("name", ["corners", "pooled, corners"])
def test_tiles_agree_where_sizes_meet_mirror_images(name: str) -> None:
    """Mirrored and resized, a tile would be off by the pixel beyond the stride."""
    network = network_of(*NETWORKS[name])
    average = Average.named("flip:yx+scale:0.5,1.75", own=reach_of(network))

    def wanted(scene_CS: NDArray[np.float64]) -> Tensor:
        return mean_by_torch(network, scene_CS, "0.5,1.75", ((), (0,), (1,), (0, 1)))

    assert gap(network, average, wanted, average.reach) <= 1e-9


@pytest.mark.parametrize("name", OWN)
def test_somebodys_own_network_sees_several_sizes_as_well(name: str) -> None:
    """Scores as large as the image are interpolated between pixels that the halo must hold."""
    network = own_network(name)
    own = custom_reach(network, probe_custom(network), crop=(64, 64), context="window")
    network = network.double()
    average = Average.named(f"scale:{SIZES}", own=own)

    def wanted(scene_CS: NDArray[np.float64]) -> Tensor:
        return mean_by_torch(network, scene_CS, SIZES)

    assert gap(network, average, wanted, average.reach) <= 1e-9


def test_the_halo_of_the_natural_size_is_too_short() -> None:
    """The comparisons above would pass whatever the halo, and prove nothing."""
    network = network_of(*NETWORKS["strides"])
    own = reach_of(network)
    average = Average.named("scale:0.5", own=own)
    short = replace(average.reach, halo=own.halo.round_up(average.reach.stride))
    assert short.halo.largest < average.reach.halo.largest

    def wanted(scene_CS: NDArray[np.float64]) -> Tensor:
        return mean_by_torch(network, scene_CS, "0.5")

    assert gap(network, average, wanted, short) > 1e-9


def test_the_predictor_resizes_as_the_oracle_does(tmp_path: Path) -> None:
    """The device's own path, in float32, would be another than the one compared in float64."""
    bundle = replace(bundle_of(POOLED, tmp_path), crop=(72, 40))
    floats = Precision(name="fp32", channels_last=True, why="asked")
    average = Average.named(f"scale:{SIZES}", own=reach_of(bundle.network()))
    predictor = AveragedPredictor(
        Predictor(bundle, device="cpu", precision=floats, context="window", threads=1), average
    )
    sweep = sweep_of(average.reach, ndim=2)
    scene_CS, whole = scene_of(sweep), Region.whole(sweep.grid.padded_shape)
    wanted_KS = mean_by_torch(bundle.network().double(), scene_CS, SIZES)
    for number in (1, len(sweep) - 1):
        tile = sweep.tile(number)
        part_CS = scene_CS[(slice(None), *tile.read.slices(within=whole))].astype(np.float32)
        frame = Frame.of(tile.read, shape=whole.shape)
        logits_KS = predictor.logits(part_CS, frame, scored=tile.scored)
        gap_KS = logits_KS - wanted_KS[(slice(None), *tile.scored.slices(within=whole))]
        assert gap_KS.abs().max() <= 1e-4 * wanted_KS.std()


@pytest.mark.parametrize(
    ("aligned", "precision"), [(False, "fp32"), (True, "fp32"), (False, "bf16")]
)
def test_canonical_windows_give_resized_tiles_of_any_size_the_same_bits(
    tmp_path: Path, aligned: bool, precision: Literal["fp32", "bf16"]
) -> None:
    """Windows would be anchored at the resized tile, or pixels resized otherwise at its edge."""
    bundle = bundle_of(replace(SLIM, align_corners=aligned), tmp_path)
    sizes = "scale:0.5,0.75,1.25"
    scenes = [
        in_canonical_tiles(bundle, sizes, shape=(75, 387), side=side, precision=precision)
        for side in (64, 192)
    ]
    assert torch.equal(*scenes)


def test_sizes_that_leave_no_whole_pixels_are_refused() -> None:
    """Tiles would drift from the scene, and the halo be too short somewhere."""
    own = Reach(stride=8, halo=Halo.uniform(8, ndim=2))
    for size in ("0.6", "0", "9"):
        with pytest.raises(PlanError, match=f"scale:{size}: sizes are quarters"):
            Average.named(f"scale:1,{size}", own=own)


@pytest.mark.parametrize("twice", ["scale:0.5,0.5", "scale:1,0.75,1.0", "flip:xx"])
def test_a_size_or_an_axis_named_twice_is_refused(twice: str) -> None:
    """A size would count twice in the mean, which nobody asks for on purpose."""
    with pytest.raises(PlanError, match=f"--average {twice} names a size or an axis twice"):
        Average.named(twice, own=Reach(stride=8, halo=Halo.uniform(8, ndim=2)))
