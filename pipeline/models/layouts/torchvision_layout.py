"""torchvision: DeepLab v3 and FCN as it has them, and ImageNet's ResNets and VGG-16 alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.models.architecture import Architecture
from pipeline.models.decimation import decimated
from pipeline.models.layouts.layout import Layout
from pipeline.models.layouts.resnet_keys import resnet_name
from pipeline.models.published import published

_VGG = "features.28.weight"
"""The last convolution of VGG-16, which has no norms."""

_WHOLE = "backbone."
"""What every name of a trunk begins with where there is a head as well."""


class Torchvision(Layout):
    """Key for key as ours."""

    crop = (480, 480)
    ignored = ("aux_classifier.*", "fc.*")
    named_by_count = True

    def architecture(self, tensors: Mapping[str, Tensor]) -> Architecture:
        """As ``Layout.architecture``."""
        if f"{_WHOLE}0.0.weight" in tensors:
            return published("v3", "mobilenetv3-large")
        if _VGG in tensors:
            return published("v1", "vgg16")
        prefix = _prefix(tensors)
        family = "fcn" if prefix and "classifier.0.weight" in tensors else "v3"
        return published(family, resnet_name(tensors, prefix=prefix))

    def modules(
        self, architecture: Architecture, tensors: Mapping[str, Tensor]
    ) -> Mapping[str, str]:
        """As ``Layout.modules``."""
        if _prefix(tensors):
            return {"backbone": "backbone", "classifier": "classifier"}
        return {"backbone": "features" if _VGG in tensors else ""}

    def ignores(self, key: str, architecture: Architecture) -> bool:
        """As ``Layout.ignores``; of VGG-16's three classifiers two are in ``begun``."""
        vgg = architecture.backbone == "vgg16" and key.startswith("classifier.")
        return vgg or super().ignores(key, architecture)

    def begun(
        self, fresh: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """As ``Layout.begun``: of VGG-16, fc6 and fc7, with every fourth filter of theirs."""
        return decimated(fresh, imagenet=tensors, seed=0) if _VGG in tensors else {}


def _prefix(tensors: Mapping[str, Tensor]) -> str:
    return _WHOLE if any(key.startswith(_WHOLE) for key in tensors) else ""
