"""VainF/DeepLabV3Plus-Pytorch: v3 and v3+ on torchvision's ResNets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from pipeline.models.architecture import Architecture, Decoder
from pipeline.models.layouts.layout import Layout
from pipeline.models.layouts.our_names import Head
from pipeline.models.layouts.resnet_keys import resnet_name
from pipeline.models.published import published

_LOW = 48


class Vainf(Layout):
    """Published at stride 16. Its decoder joins low-level features before the encoder's."""

    named_by_count = True

    def architecture(self, tensors: Mapping[str, Tensor]) -> Architecture:
        """As ``Layout.architecture``."""
        backbone = resnet_name(tensors, prefix="backbone.")
        made = published("v3", backbone, output_stride=16)
        if "classifier.project.0.weight" not in tensors:
            return made
        return replace(made, family="v3plus", decoder=Decoder(low=_LOW, widths=(256,)))

    def modules(
        self, architecture: Architecture, tensors: Mapping[str, Tensor]
    ) -> Mapping[str, str]:
        """As ``Layout.modules``."""
        if architecture.decoder is None:
            return {"backbone": "backbone", "classifier": "classifier.classifier"}
        return {
            "backbone": "backbone",
            Head(architecture).aspp: "classifier.aspp",
            "classifier.low": "classifier.project",
            "classifier.fuse": "classifier.classifier",
            "classifier.classify": "classifier.classifier.3",
        }

    def moved(self, architecture: Architecture) -> Mapping[str, int]:
        """As ``Layout.moved``."""
        return {} if architecture.decoder is None else {"classifier.fuse.0": _LOW}
