"""Trunks: what turns an image (B, C, *S) into features at the output stride."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from pipeline.models.architecture import Architecture
from pipeline.models.medicalnet import MEDICALNETS, MedicalNetTrunk
from pipeline.models.resnet import RESNETS, ResNetTrunk
from pipeline.models.slim import SlimTrunk
from pipeline.models.xception import XCEPTIONS, XceptionTrunk

if TYPE_CHECKING:
    from pipeline.models.mobilenet import MobileNetTrunk

Trunk: TypeAlias = "MedicalNetTrunk | MobileNetTrunk | ResNetTrunk | SlimTrunk | XceptionTrunk"
"""Each gives ``channels`` features, and from ``taps`` with them ``low_channels`` low-level ones, at
``low_stride`` px (of volumes, per axis), for a decoder."""


def build_trunk(architecture: Architecture, *, bands: int) -> Trunk:
    """The trunk that an architecture names."""
    name, stride = architecture.backbone, architecture.output_stride
    if name == "slim":
        return SlimTrunk(architecture, bands=bands)
    if name == "mobilenetv3-large":  # torchvision's, which takes long to import
        from pipeline.models.mobilenet import MobileNetTrunk

        return MobileNetTrunk(bands=bands)
    if name in MEDICALNETS:
        return MedicalNetTrunk(architecture, bands=bands)
    if name in XCEPTIONS:
        return XceptionTrunk(
            XCEPTIONS[name],
            bands=bands,
            output_stride=stride,
            multi_grid=architecture.multi_grid,
        )
    return ResNetTrunk(RESNETS[name], architecture, bands=bands)
