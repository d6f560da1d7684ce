"""What would run on a GPU, by torch's fake tensors: they have a device and a shape, and no numbers.

They refuse what a GPU would refuse, an operation between two devices, on machines without one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import fresh
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.domain import Region
from pipeline.inference.average import Average, AveragedPredictor
from pipeline.inference.feature_map import FeatureMap
from pipeline.inference.precision import Precision
from pipeline.inference.predictor import Predictor
from pipeline.models.frame import Frame
from workflows.tracing import traced

NETWORKS = {
    "slim": {"backbone": "slim"},
    "resnet18": {"backbone": "resnet18"},  # ASPP summed by rows
    "v3plus": {"backbone": "resnet18", "family": "v3plus"},
    "v2": {"backbone": "vgg16", "family": "v2"},
    "slim 3-D": {"dims": 3},
}
SHAPES = {"slim": (600, 800), "resnet18": (600, 800), "v3plus": (608, 800), "v2": (321, 385)}


def on_gpu(predictor: Predictor) -> Predictor:
    """The same with its weights on a GPU that is not there; within ``FakeTensorMode``."""
    predictor._device = torch.device("cuda")
    chain = predictor._network.chain
    predictor._network = predictor._in_windows(chain.moved(lambda weight: weight.to("cuda")))
    return predictor


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("hosted", [False, True], ids=["maps on the GPU", "maps in the host"])
@pytest.mark.parametrize("name", NETWORKS)
def test_windows_are_computed_on_the_gpu_and_maps_lie_where_they_should(
    tmp_path: Path, name: str, precision: str, hosted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first tile on a real card would fail: a tensor that was left behind, or was never moved.

    Or all maps would fill the card that has no room for them.
    """
    bundle, shape = fresh(tmp_path / "b", **NETWORKS[name]), SHAPES.get(name, (60, 56, 64))
    predictor = Predictor(
        bundle,
        device="cpu",
        precision=Precision(name=precision, channels_last=True, why=""),
        context="window",
        threads=1,
        hosted=hosted,
    )
    places = []

    def write(self: FeatureMap, region: Region, value_BCS: torch.Tensor) -> None:
        places.append((self.array_BSC.device.type, value_BCS.device.type))
        self.view(region).copy_(value_BCS)

    monkeypatch.setattr(FeatureMap, "write", write)
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits_KS = on_gpu(predictor).logits(
            np.zeros((3, *shape), np.float32),
            Frame((0,) * len(shape), shape),
            scored=Region.whole(shape),
        )
    assert (logits_KS.device.type, logits_KS.dtype) == ("cuda", torch.float32)
    assert logits_KS.shape == (4, *shape)
    if hosted:  # the image goes to its map as it is, and logits stay
        assert {("cpu", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")} == set(places)
    else:
        assert {("cuda", "cuda")} == set(places)


def test_a_mean_over_sizes_and_mirror_images_is_taken_on_the_gpu(tmp_path: Path) -> None:
    """The images that are resized and mirrored, or their mean, would stay in the host."""
    bundle, shape = fresh(tmp_path / "b"), (512, 512)
    average = Average.named("flip:yx+scale:0.5,1", own=traced(bundle, "window").average.own)
    predictor = Predictor(
        bundle,
        device="cpu",
        precision=Precision(name="fp32", channels_last=True, why=""),
        context="window",
        threads=1,
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits_KS = AveragedPredictor(on_gpu(predictor), average).logits(
            np.zeros((3, *shape), np.float32), Frame((0, 0), shape), scored=Region.whole(shape)
        )
    assert logits_KS.device.type == "cuda"
