"""jfzhang95/pytorch-deeplab-xception: v3+ on ResNet-101."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from pipeline.models.architecture import Architecture
from pipeline.models.layouts.layout import Layout
from pipeline.models.layouts.our_names import Head
from pipeline.models.layouts.resnet_keys import resnet_name, size_of
from pipeline.models.published import published


class Jfzhang(Layout):
    """Published at stride 16, with a multi-grid of 1, 2 and 4; corners are aligned."""

    named_by_count = True

    def architecture(self, tensors: Mapping[str, Tensor]) -> Architecture:
        """As ``Layout.architecture``."""
        size_of(tensors, "aspp.conv1.weight")
        backbone = resnet_name(tensors, prefix="backbone.")
        made = published("v3plus", backbone, output_stride=16)
        return replace(made, align_corners=True, dilate_first=True, multi_grid=(1, 2, 4))

    def modules(
        self, architecture: Architecture, tensors: Mapping[str, Tensor]
    ) -> Mapping[str, str]:
        """As ``Layout.modules``."""
        head = Head(architecture)
        names = {
            "backbone": "backbone",
            f"{head.aspp}.convs.0.0": "aspp.aspp1.atrous_conv",
            f"{head.aspp}.convs.0.1": "aspp.aspp1.bn",
            head.image_pool: "aspp.global_avg_pool",
            f"{head.aspp}.project.0": "aspp.conv1",
            f"{head.aspp}.project.1": "aspp.bn1",
            "classifier.low.0": "decoder.conv1",
            "classifier.low.1": "decoder.bn1",
            "classifier.classify": "decoder.last_conv.8",
        }
        for number, layers in head.branches():
            names[layers["conv"]] = f"aspp.aspp{number + 1}.atrous_conv"
            names[layers["bn"]] = f"aspp.aspp{number + 1}.bn"
        for number, layers in head.fuses():  # dropout follows each there
            names[layers["conv"]] = f"decoder.last_conv.{4 * number}"
            names[layers["bn"]] = f"decoder.last_conv.{4 * number + 1}"
        return names
