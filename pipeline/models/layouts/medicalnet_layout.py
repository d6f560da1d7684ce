"""Tencent/MedicalNet: trunks for volumes alone, trained on 23 sets of CT and MR."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.models.architecture import Architecture
from pipeline.models.input_spec import Scaling
from pipeline.models.layouts.layout import Layout
from pipeline.models.layouts.resnet_keys import by_depth
from pipeline.models.published import published

_DEPTHS = {
    (1, False): "medicalnet10",
    (2, False): "medicalnet18",
    (6, False): "medicalnet34",
    (6, True): "medicalnet50",
}
"""By the units of the third layer, and whether they narrow."""


class MedicalNet(Layout):
    """Key for key as ours; its own head, of two deconvolutions, is left out."""

    bands = ("intensity",)
    dtype = "float32"
    crop = (96, 96, 96)
    ignored = ("conv_seg.*",)
    note = (
        "trained on volumes of mean 0 and deviation 1 each; here the scaling is fixed: state that"
        " of your scans"
    )

    def architecture(self, tensors: Mapping[str, Tensor]) -> Architecture:
        """As ``Layout.architecture``."""
        return published("v3", by_depth(tensors, _DEPTHS, prefix=""), dims=3)

    def modules(
        self, architecture: Architecture, tensors: Mapping[str, Tensor]
    ) -> Mapping[str, str]:
        """As ``Layout.modules``."""
        return {"backbone": ""}

    def scaling(self, architecture: Architecture) -> Scaling:
        """As ``Layout.scaling``: of numbers as CT and MR have them."""
        return Scaling(type="z-score", mean=(0.0,), std=(100.0,))
