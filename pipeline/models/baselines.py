"""Networks to compare DeepLab with that are none: SegNet, and the U-Net of a library.

They are bundles of family ``custom``, as somebody's own network is. The FCN is not among them: its
layers are torchvision's, and it runs in stages (``Architecture``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pipeline.errors import BundleError
from pipeline.models.custom_architecture import CustomArchitecture

BASELINES = MappingProxyType(
    {"segnet": "pipeline.models.segnet:SegNet", "unet": "segmentation_models_pytorch:Unet"}
)
"""What makes each: ours, for no library keeps one, and that of the extra ``baselines``."""

_STRIDE_PX = 32
"""Both halve five times."""


def baseline(
    family: str, backbone: str, *, dims: int, bands: int, classes: int
) -> CustomArchitecture:
    """A baseline for images of so many bands; a U-Net on any encoder that its library names.

    Raises BundleError for other axes than 2, and for a SegNet that is not on ``vgg16``.
    """
    if dims != 2:
        raise BundleError(f"family {family} is for 2-D images, dims is {dims}")
    arguments: Mapping[str, Any] = {"bands": bands, "classes": classes}
    if family == "unet":
        arguments = {
            "encoder_name": backbone,
            "encoder_weights": None,
            "in_channels": bands,
            "classes": classes,
        }
    elif backbone != "vgg16":
        raise BundleError(f"family segnet has the backbone vgg16, not {backbone!r}")
    return CustomArchitecture(
        family="custom",
        dims=dims,
        output_stride=_STRIDE_PX,
        entry_point=BASELINES[family],
        arguments=arguments,
    )
