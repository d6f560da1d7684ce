"""OpenMMLab's MMSegmentation: v3 and v3+ on its ResNets with a deep stem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from pipeline.models.architecture import Architecture, Decoder
from pipeline.models.input_spec import ClassInfo
from pipeline.models.layouts.layout import Layout
from pipeline.models.layouts.our_names import Head
from pipeline.models.layouts.resnet_keys import resnet_name, size_of
from pipeline.models.published import published

_HEAD = "decode_head"
_STEM = ("0", "1", "3", "4", "6")
"""Layers of the stem that have weights, but for the last norm, which is called ``bn1`` here."""


class Mmseg(Layout):
    """Published at stride 8 (D8); the mean of the image is joined before the other branches."""

    crop = (512, 512)
    ignored = ("auxiliary_head.*",)
    named_by_count = True

    def architecture(self, tensors: Mapping[str, Tensor]) -> Architecture:
        """As ``Layout.architecture``."""
        backbone = resnet_name(tensors, prefix="backbone.", stem="stem")
        width = size_of(tensors, f"{_HEAD}.bottleneck.conv.weight")
        made = replace(
            published("v3", backbone), width=width, projection=3, smoothing=False, separable=None
        )
        low = f"{_HEAD}.c1_bottleneck.conv.weight"
        if low not in tensors:
            return made
        decoder = Decoder(low=size_of(tensors, low), widths=(width, width))
        return replace(made, family="v3plus", separable="normed", decoder=decoder)

    def modules(
        self, architecture: Architecture, tensors: Mapping[str, Tensor]
    ) -> Mapping[str, str]:
        """As ``Layout.modules``."""
        head = Head(architecture)
        names = {"backbone": "backbone", head.last: f"{_HEAD}.conv_seg"}
        if architecture.backbone.endswith("c"):
            names |= {f"backbone.conv1.{n}": f"backbone.stem.{n}" for n in _STEM}
            names["backbone.bn1"] = "backbone.stem.7"
        pairs = {
            f"{head.aspp}.convs.0": (f"{_HEAD}.aspp_modules.0", 0, 1),
            head.image_pool: (f"{_HEAD}.image_pool.1", 1, 2),
            f"{head.aspp}.project": (f"{_HEAD}.bottleneck", 0, 1),
            "classifier.low": (f"{_HEAD}.c1_bottleneck", 0, 1),
        }
        for ours, (theirs, conv, norm) in pairs.items():
            names |= {f"{ours}.{conv}": f"{theirs}.conv", f"{ours}.{norm}": f"{theirs}.bn"}
        for number, layers in head.branches():
            names |= _mixed(layers, f"{_HEAD}.aspp_modules.{number}")
        for number, layers in head.fuses():
            names |= _mixed(layers, f"{_HEAD}.sep_bottleneck.{number}")
        return names

    def moved(self, architecture: Architecture) -> Mapping[str, int]:
        """As ``Layout.moved``."""
        assert architecture.width is not None
        return {f"{Head(architecture).aspp}.project.0": architecture.width}

    def classes(self, beside: Mapping[str, Any]) -> tuple[ClassInfo, ...] | None:
        """As ``Layout.classes``: published files say names and colours."""
        meta = beside.get("meta", {})
        said = meta.get("dataset_meta") or {
            "classes": meta.get("CLASSES"),
            "palette": meta.get("PALETTE"),
        }
        names, palette = said.get("classes"), said.get("palette")
        if not names or not palette or len(names) != len(palette):
            return None
        return tuple(
            ClassInfo(id=number, name=str(name), color="#" + bytes(map(int, rgb)).hex())
            for number, (name, rgb) in enumerate(zip(names, palette, strict=True))
        )


def _mixed(layers: Mapping[str, str], theirs: str) -> dict[str, str]:
    """A convolution and its norm, or the two parts of one and theirs."""
    if "conv" in layers:
        return {layers["conv"]: f"{theirs}.conv", layers["bn"]: f"{theirs}.bn"}
    names = {}
    for part in ("depthwise", "pointwise"):
        names[layers[part]] = f"{theirs}.{part}_conv.conv"
        names[layers[f"{part} bn"]] = f"{theirs}.{part}_conv.bn"
    return names
