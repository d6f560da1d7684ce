"""ResNet trunks: torchvision's, and those of the authors' releases of v3.

Parameters are named as torchvision's, blocks that follow the fourth are ``layer5`` to ``layer7``.
Axes in array names: B batch, C channel, S space (y, x).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.models.architecture import Architecture
from pipeline.models.blocks import conv_norm_relu, norm
from pipeline.models.residual import BasicUnit, Bottleneck, ResidualUnit


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What sets one ResNet apart from another."""

    unit: type[BasicUnit | Bottleneck]

    depths: tuple[int, ...]
    """Units of each block."""

    stem: tuple[int, ...] = ()
    """Channels of the 3x3 convolutions that it starts with; none: one 7x7 of 64."""

    strided: Literal["first", "last"] = "first"
    """Which unit of a block halves the size: the first, of all blocks but the first; or the last,
    of all blocks but the last."""

    @property
    def stem_width(self) -> int:
        """Channels that block 1 is given."""
        return self.stem[-1] if self.stem else 64


_R50, _R101 = (3, 4, 6, 3), (3, 4, 23, 3)
_DEEP, _BETA = (32, 32, 64), (64, 64, 128)

RESNETS = MappingProxyType(
    {
        "resnet18": Layout(unit=BasicUnit, depths=(2, 2, 2, 2)),
        "resnet50": Layout(unit=Bottleneck, depths=_R50),
        "resnet101": Layout(unit=Bottleneck, depths=_R101),
        "resnet50c": Layout(unit=Bottleneck, depths=_R50, stem=_DEEP),
        "resnet101c": Layout(unit=Bottleneck, depths=_R101, stem=_DEEP),
        "resnet50-tf": Layout(unit=Bottleneck, depths=_R50, strided="last"),
        "resnet101-tf": Layout(unit=Bottleneck, depths=_R101, strided="last"),
        "resnet50-beta": Layout(unit=Bottleneck, depths=_R50, stem=_BETA, strided="last"),
        "resnet101-beta": Layout(unit=Bottleneck, depths=_R101, stem=_BETA, strided="last"),
    }
)


class ResNetTrunk(nn.Module):
    """A ResNet up to its last block, dilated to an output stride, for any bands."""

    low_stride = 4

    def __init__(self, layout: Layout, architecture: Architecture, *, bands: int) -> None:
        super().__init__()
        self.conv1 = _stem(bands, layout.stem)
        self.bn1 = norm(2, layout.stem_width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        depths = layout.depths + layout.depths[-1:] * architecture.cascade
        inputs = layout.stem_width
        self._blocks = [f"layer{number + 1}" for number in range(len(depths))]
        for number, slides in enumerate(_slides(layout, architecture, depths)):
            width = 64 << min(number, 3)
            units = []
            for slide in slides:
                units.append(_unit(layout.unit, inputs, width, slide=slide))
                inputs = width * layout.unit.expansion
            self.add_module(self._blocks[number], nn.Sequential(*units))
        self.channels, self.low_channels = inputs, 64 * layout.unit.expansion
        self._tap_within = layout.strided == "last"
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Return (B, channels, *S / stride) features."""
        return self.taps(image_BCS)[1]

    def taps(self, image_BCS: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, low_channels, *S / 4) low-level features, and those at the output stride."""
        features_BCS: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(image_BCS))))
        first, *rest = (self.get_submodule(name) for name in self._blocks)
        if self._tap_within:
            low_BCS, features_BCS = _tapped(first, features_BCS)
        else:
            low_BCS = features_BCS = first(features_BCS)
        for block in rest:
            features_BCS = block(features_BCS)
        return low_BCS, features_BCS


@dataclass(frozen=True, slots=True)
class _Slide:
    """How a unit moves: its stride, and the rates of the strided 3x3 convolution and any after."""

    stride: int
    rates: tuple[int, int]


def _slides(
    layout: Layout, architecture: Architecture, depths: tuple[int, ...]
) -> Iterator[list[_Slide]]:
    """Of the units of each block: once the output stride is reached, strides become rates.

    What follows a convolution that gave up its stride is dilated as much more, so that the features
    hold those of the strided network; copies of the last block go on so (Chen et al. 2017, Fig. 3).
    """
    stride, rate = 4, 1
    for number, depth in enumerate(depths):
        slides = []
        factors = architecture.multi_grid if number >= 3 else ()
        for unit, factor in zip(range(depth), factors or (1,) * depth, strict=True):
            if layout.strided == "first":
                halves = number > 0 and unit == 0
            else:
                halves = number < len(depths) - 1 and unit == depth - 1
            before, kept = rate, halves and stride < architecture.output_stride
            stride *= 2 if kept else 1
            rate *= 2 if halves and not kept else 1
            first = rate if architecture.dilate_first else before
            slides.append(_Slide(2 if kept else 1, (first * factor, rate * factor)))
        yield slides


def _unit(
    kind: type[BasicUnit | Bottleneck], inputs: int, width: int, *, slide: _Slide
) -> ResidualUnit:
    """A residual unit; its shortcut is a convolution where the channels change."""
    outputs = width * kind.expansion
    shortcut: nn.Module | None = None
    if inputs != outputs:
        pointwise = nn.Conv2d(inputs, outputs, 1, stride=slide.stride, bias=False)
        shortcut = nn.Sequential(pointwise, norm(2, outputs))
    elif slide.stride > 1:
        shortcut = nn.MaxPool2d(1, stride=slide.stride)  # every second place
    unit = kind(inputs, width, stride=slide.stride, downsample=shortcut)
    wide = [m for m in unit.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    for layer, rate in zip(wide, slide.rates, strict=False):  # a bottleneck has one alone
        layer.dilation = layer.padding = (rate, rate)
    return unit


def _stem(bands: int, widths: tuple[int, ...]) -> nn.Module:
    """What halves the size first, without its last norm and ReLU."""
    if not widths:
        return nn.Conv2d(bands, 64, 7, stride=2, padding=3, bias=False)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((bands, *widths)):
        layers += conv_norm_relu(2, inputs, outputs, kernel=3)
    layers[0] = nn.Conv2d(bands, widths[0], 3, stride=2, padding=1, bias=False)
    return nn.Sequential(*layers[:-2])


def _tapped(block: nn.Module, features_BCS: Tensor) -> tuple[Tensor, Tensor]:
    """Run block 1, and return the low-level features of the authors' release, and its output.

    They are what the last unit but one adds to its input, before the stride.
    """
    tapped: Any
    *units, tapped, last = block.children()
    for unit in units:
        features_BCS = unit(features_BCS)
    narrow_BCS = tapped.relu(tapped.bn1(tapped.conv1(features_BCS)))
    mixed_BCS = tapped.relu(tapped.bn2(tapped.conv2(narrow_BCS)))
    low_BCS: Tensor = tapped.bn3(tapped.conv3(mixed_BCS))
    return low_BCS, last(tapped.relu(torch.add(low_BCS, features_BCS)))
