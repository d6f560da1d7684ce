"""timm: trunks of ImageNet alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.errors import BundleError
from pipeline.models.architecture import Architecture
from pipeline.models.input_spec import Scaling
from pipeline.models.layouts.layout import IMAGENET, UNIT_RANGE, Layout
from pipeline.models.layouts.resnet_keys import resnet_name
from pipeline.models.published import published
from pipeline.models.xception import XCEPTIONS


class Timm(Layout):
    """Its ResNets are named as torchvision's, and ours as its Xceptions."""

    ignored = ("fc.*", "head.fc.*")

    def architecture(self, tensors: Mapping[str, Tensor]) -> Architecture:
        """As ``Layout.architecture``."""
        if "stem.0.conv.weight" not in tensors:
            return published("v3", resnet_name(tensors, prefix=""))
        blocks = {key.split(".")[1] for key in tensors if key.startswith("blocks.")}
        for name, units in XCEPTIONS.items():
            if len(units) == len(blocks):
                return published("v3", name)
        raise BundleError(f"the file has an Xception of {len(blocks)} units: none is built here")

    def modules(
        self, architecture: Architecture, tensors: Mapping[str, Tensor]
    ) -> Mapping[str, str]:
        """As ``Layout.modules``."""
        return {"backbone": ""}

    def scaling(self, architecture: Architecture) -> Scaling:
        """As ``Layout.scaling``."""
        return UNIT_RANGE if architecture.backbone in XCEPTIONS else IMAGENET
