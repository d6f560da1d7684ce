"""segmentation_models_pytorch: DeepLabV3 and DeepLabV3Plus on torchvision's ResNets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from pipeline.models.architecture import Architecture, Decoder
from pipeline.models.layouts.layout import Layout
from pipeline.models.layouts.our_names import Head
from pipeline.models.layouts.resnet_keys import resnet_name, size_of
from pipeline.models.published import published

_ASPPS = ("decoder.aspp", "decoder.aspp.0", "decoder.0")
"""ASPP of v3, of v3+, and of v3 in its first releases, which numbered the layers."""


class Smp(Layout):
    """By default v3 is of stride 8 and v3+ of 16, and the rates are 12, 24 and 36 for both."""

    crop = (512, 512)
    note = (
        "trained on sides of k x stride px with corners aligned; here sides are k x stride + 1,"
        " so that tiles agree"
    )

    def architecture(self, tensors: Mapping[str, Tensor]) -> Architecture:
        """As ``Layout.architecture``."""
        backbone = resnet_name(tensors, prefix="encoder.")
        aspp, low = _aspp(tensors), "decoder.block1.0.weight"
        width = size_of(tensors, f"{aspp}.project.0.weight")
        made = replace(
            published("v3", backbone),
            align_corners=True,
            dilate_first=True,
            smoothing=True,
            separable="bare" if f"{aspp}.convs.1.0.0.weight" in tensors else None,
            width=width,
        )
        if low not in tensors:
            return made
        decoder = Decoder(low=size_of(tensors, low), widths=(width,))
        return replace(made, family="v3plus", output_stride=16, decoder=decoder)

    def modules(
        self, architecture: Architecture, tensors: Mapping[str, Tensor]
    ) -> Mapping[str, str]:
        """As ``Layout.modules``."""
        head, aspp = Head(architecture), _aspp(tensors)
        names = {"backbone": "encoder", head.last: "segmentation_head.0", head.aspp: aspp}
        if architecture.separable:
            for number, layers in head.branches():
                names |= _separable(layers, f"{aspp}.convs.{number}.0", f"{aspp}.convs.{number}.1")
        smooth = head.mixes(head.encoder, first=1)
        if architecture.decoder is None:
            old = aspp == _ASPPS[2]
            for part, theirs in (("conv", "1" if old else "conv"), ("bn", "2" if old else "bn")):
                names[smooth[part]] = f"decoder.{theirs}"
        else:
            names |= _separable(smooth, "decoder.aspp.1", "decoder.aspp.2")
            names["classifier.low"] = "decoder.block1"
            for _, layers in head.fuses():
                names |= _separable(layers, "decoder.block2.0", "decoder.block2.1")
        return names

    def at_stride(self, architecture: Architecture, stride: int) -> Architecture:
        """As ``Layout.at_stride``; its rates do not change with the stride."""
        return replace(architecture, output_stride=stride)


def _aspp(tensors: Mapping[str, Tensor]) -> str:
    return next((name for name in _ASPPS if f"{name}.convs.0.0.weight" in tensors), _ASPPS[0])


def _separable(layers: Mapping[str, str], pair: str, norm: str) -> dict[str, str]:
    return {
        layers["depthwise"]: f"{pair}.0",
        layers["pointwise"]: f"{pair}.1",
        layers["pointwise bn"]: norm,
    }
