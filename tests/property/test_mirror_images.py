"""Probabilities averaged over mirror images: in tiles as of the whole scene."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from averages import bundle_of, in_canonical_tiles, network_of, read_region, worst
from numpy.typing import NDArray
from torch import Tensor

from pipeline.domain import Grid, Halo, Pass, Reach, Region
from pipeline.errors import PlanError
from pipeline.inference.average import Average, AveragedPredictor
from pipeline.inference.zoom import Zoom
from pipeline.models.architecture import Architecture
from pipeline.models.deeplab import DeepLab
from pipeline.models.frame import Frame
from pipeline.models.published import published
from pipeline.models.receptive_field import reach_of

SLIM = published("v3", "slim")
NETWORKS: dict[str, tuple[Architecture, tuple[int, ...]]] = {
    "strides": (SLIM, (64, 64)),
    "corners": (replace(SLIM, align_corners=True), (64, 64)),
    "pooled": (replace(SLIM, output_stride=8, rates=(1,), image_pooling=True), (72, 40)),
    "pooled, corners": (
        replace(SLIM, output_stride=8, rates=(1,), image_pooling=True, align_corners=True),
        (72, 40),
    ),
    "decoder, corners": (replace(published("v3plus", "slim"), align_corners=True), (64, 64)),
    "volume": (published("v3", "slim", dims=3), (16, 16, 16)),
}
CASES = [(name, "yx") for name in NETWORKS if name != "volume"] + [("volume", "zx")]

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Plain:
    """One pass of the plain module."""

    network: DeepLab

    def logits(self, image_CS: NDArray[Any], frame: Frame, *, scored: Region, zoom: Zoom) -> Tensor:
        frame.check(
            image_CS.shape[1:],
            stride=self.network.stride,
            endpoint=int(self.network.align_corners),
        )
        read = read_region(image_CS, frame)
        with torch.inference_mode():
            logits_KS = self.network(torch.from_numpy(image_CS)[None], frame)[0]
        return logits_KS[(slice(None), *scored.slices(within=read))]

    def pooled(self, image_CS: NDArray[Any], frame: Frame, *, core: Region) -> Tensor:
        raise NotImplementedError


def sweep_of(name: str, reach: Reach) -> Pass:
    ndim = NETWORKS[name][0].dims
    shape = (75, 187) if ndim == 2 else (27, 7, 75)
    side = 32 if ndim == 2 else 16
    grid = Grid(shape=shape, tile=(side,) * ndim, stride=reach.stride, endpoint=reach.endpoint)
    halo = Halo.uniform(5, ndim=ndim)
    return Pass(case="", name="", grid=grid, reach=reach, crf_halo=halo)


def gap(name: str, average: Average, reach: Reach) -> float:
    """Greatest difference of any tile from the whole scene, in deviations."""
    network, sweep = network_of(*NETWORKS[name]), sweep_of(name, reach)
    return worst(
        AveragedPredictor(Plain(network), average),
        sweep,
        lambda scene_CS: mean_of_mirrors(network, scene_CS, average.axes),
        (0, len(sweep) // 2, len(sweep) - 1),
    )


def mean_of_mirrors(
    network: DeepLab, scene_CS: NDArray[np.float64], axes: tuple[int, ...]
) -> Tensor:
    """(K, *S) logarithm of the mean of the probabilities of whole scenes."""
    image_BCS = torch.from_numpy(scene_CS)[None]
    frame = Frame((0,) * (image_BCS.ndim - 2), tuple(image_BCS.shape[2:]))
    parts = []
    for mirrored in itertools.product((False, True), repeat=len(axes)):
        dims = [axis + 2 for axis, turn in zip(axes, mirrored, strict=True) if turn]
        with torch.inference_mode():
            parts.append(network(image_BCS.flip(dims), frame).softmax(1).flip(dims)[0])
    return torch.stack(parts).mean(0).log()


@pytest.mark.parametrize(("name", "letters"), CASES)
def test_tiles_agree_with_the_mean_over_whole_mirrored_scenes(name: str, letters: str) -> None:
    """A mirrored tile would lie beside its place, or read too little on its other side."""
    average = Average.named(f"flip:{letters}", own=reach_of(network_of(*NETWORKS[name])))
    assert gap(name, average, average.reach) <= 1e-9


def test_a_halo_of_the_other_side_is_too_short() -> None:
    """The comparison above would pass whatever the halo, and prove nothing."""
    average = Average.named("flip:x", own=reach_of(network_of(*NETWORKS["strides"])))
    reach = average.reach
    short = replace(reach, halo=Halo.uniform(reach.halo.largest - reach.stride, ndim=2))
    assert gap("strides", average, short) > 1e-9


def test_canonical_windows_give_mirrored_tiles_of_any_size_the_same_bits(tmp_path: Path) -> None:
    """Windows would be anchored at the mirrored tile's corner instead of the mirrored scene's."""
    bundle = bundle_of(SLIM, tmp_path)
    scenes = [
        in_canonical_tiles(bundle, "flip:yx", shape=(75, 187), side=side, precision="fp32")
        for side in (64, 128)
    ]
    assert torch.equal(*scenes)


def test_a_class_far_behind_has_a_finite_logit() -> None:
    """Its probability would be 0, its logarithm no number, and the certificate's difference NaN."""

    class Sure(Plain):
        def logits(self, image_CS: NDArray[Any], frame: Frame, **_: Any) -> Tensor:
            turned = frame.origin[1] > 0
            return torch.tensor([0.0, 2000.0 + 500 * turned])[:, None, None]

    own = Reach(stride=1, halo=Halo.uniform(0, ndim=2))
    predictor = AveragedPredictor(
        Sure(network_of(*NETWORKS["strides"])), Average(own=own, axes=(1,))
    )
    image_CS = np.zeros((2, 1, 1), np.float32)
    found_KS = predictor.logits(image_CS, Frame((0, 0), (1, 2)), scored=Region((0, 0), (1, 1)))
    assert found_KS.flatten().tolist() == pytest.approx([-2000 - math.log(2), 0.0])


def test_axes_that_an_image_does_not_have_are_refused() -> None:
    """A flip along z would be ignored for a raster, and the run recorded as if it had been done."""
    with pytest.raises(PlanError, match="axes of this image are y, x"):
        Average.named("flip:zx", own=Reach(stride=4, halo=Halo.uniform(8, ndim=2)))
