"""kazuto1011/deeplab-pytorch: v2 on ResNet-101, with its weights from Caffe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from pipeline.models.architecture import Architecture
from pipeline.models.input_spec import Scaling
from pipeline.models.layouts.layout import Layout
from pipeline.models.layouts.resnet_keys import size_of
from pipeline.models.published import published

_DEPTHS = (3, 4, 23, 3)
_UNIT = {
    "conv1": "reduce.conv",
    "bn1": "reduce.bn",
    "conv2": "conv3x3.conv",
    "bn2": "conv3x3.bn",
    "conv3": "increase.conv",
    "bn3": "increase.bn",
    "downsample.0": "shortcut.conv",
    "downsample.1": "shortcut.bn",
}
_MULTI_SCALE = "base."
"""What every name begins with where the network is run at several scales."""


class Kazuto(Layout):
    """Blue, green, red, and their means taken off; strides lie in the first 1x1 of a layer."""

    bands = ("blue", "green", "red")
    crop = (321, 321)
    named_by_count = True
    note = "trained with resizes that do not align corners; here they do, so that tiles agree"

    def architecture(self, tensors: Mapping[str, Tensor]) -> Architecture:
        """As ``Layout.architecture``."""
        prefix = _prefix(tensors)
        size_of(tensors, f"{prefix}aspp.c0.weight")
        made = published("v2", "resnet101")
        return replace(made, multi_scale="inputs") if prefix else made

    def modules(
        self, architecture: Architecture, tensors: Mapping[str, Tensor]
    ) -> Mapping[str, str]:
        """As ``Layout.modules``."""
        prefix = _MULTI_SCALE if architecture.multi_scale else ""
        names = {
            "backbone.conv1": f"{prefix}layer1.conv1.conv",
            "backbone.bn1": f"{prefix}layer1.conv1.bn",
        }
        for layer, depth in enumerate(_DEPTHS, start=1):
            for unit in range(depth):
                for ours, theirs in _UNIT.items():
                    there = f"{prefix}layer{layer + 1}.block{unit + 1}.{theirs}"
                    names[f"backbone.layer{layer}.{unit}.{ours}"] = there
        for number in range(len(architecture.rates)):
            names[f"aspp.{number}"] = f"{prefix}aspp.c{number}"
        return names

    def scaling(self, architecture: Architecture) -> Scaling:
        """As ``Layout.scaling``."""
        return Scaling(type="z-score", mean=(104.008, 116.669, 122.675), std=(1.0,))


def _prefix(tensors: Mapping[str, Tensor]) -> str:
    return _MULTI_SCALE if any(key.startswith(_MULTI_SCALE) for key in tensors) else ""
