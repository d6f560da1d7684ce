"""The modified aligned Xception of v3+ (Chen et al. 2018, section 3.2), as its authors released it.

Parameters are named as in timm, which carries the released weights of its classifier. Strided
convolutions are padded alike on both sides, so that a place of the features is a place of the
image whatever the size.

Axes in array names: B batch, C channel, S space (y, x).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from pipeline.models.blocks import depthwise, norm

_EPSILON = 1e-3
"""Of batch norm in the released trunk; ASPP and decoder have 1e-5."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Three separable convolutions, of which the last has the stride."""

    widths: tuple[int, int, int]
    """Channels of each."""

    stride: int = 1


_MIDDLE = Unit((728, 728, 728))
_ENTRY = (Unit((128,) * 3, 2), Unit((256,) * 3, 2), Unit((728,) * 3, 2))
_ENTRY_71 = (_ENTRY[0], Unit((256,) * 3), _ENTRY[1], Unit((728,) * 3), _ENTRY[2])
_EXIT = (Unit((728, 1024, 1024), 2), Unit((1536, 1536, 2048)))

XCEPTIONS = MappingProxyType(
    {
        "xception41": (*_ENTRY, *[_MIDDLE] * 8, *_EXIT),
        "xception65": (*_ENTRY, *[_MIDDLE] * 16, *_EXIT),
        "xception71": (*_ENTRY_71, *[_MIDDLE] * 16, *_EXIT),
    }
)
"""Units of each trunk, after its two plain convolutions."""


class SeparableConv(nn.Module):
    """Depthwise and pointwise convolution, each with batch norm, and ReLU where ``relu``."""

    def __init__(
        self, inputs: int, outputs: int, *, stride: int, dilation: int, relu: bool
    ) -> None:
        super().__init__()
        self.conv_dw = depthwise(2, inputs, stride=stride, dilation=dilation)
        self.bn_dw = norm(2, inputs, epsilon=_EPSILON)
        self.act_dw = nn.ReLU(inplace=True) if relu else nn.Identity()
        self.conv_pw = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn_pw = norm(2, outputs, epsilon=_EPSILON)
        self.act_pw = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, features_BCS: Tensor) -> Tensor:
        """Return (B, outputs, *S / stride) features."""
        mixed_BCS = self.act_dw(self.bn_dw(self.conv_dw(features_BCS)))
        result: Tensor = self.act_pw(self.bn_pw(self.conv_pw(mixed_BCS)))
        return result


class ConvNorm(nn.Module):
    """A strided convolution and batch norm, and ReLU where ``relu``."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int, relu: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False
        )
        self.bn = norm(2, outputs, epsilon=_EPSILON)
        self.act = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, features_BCS: Tensor) -> Tensor:
        """Return (B, outputs, *S / stride) features."""
        result: Tensor = self.act(self.bn(self.conv(features_BCS)))
        return result


class XceptionUnit(nn.Module):
    """ReLU and a separable convolution, three times, and a shortcut around them."""

    def __init__(self, inputs: int, unit: Unit, *, stride: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        outputs = unit.widths[-1]
        self.shortcut = (
            None
            if inputs == outputs and unit.stride == 1
            else ConvNorm(inputs, outputs, kernel=1, stride=stride, relu=False)
        )
        self.stack = nn.Sequential()
        for number, (width, rate) in enumerate(zip(unit.widths, rates, strict=True), start=1):
            # The first is given what the shortcut is given, the third what a decoder taps: they
            # must not write over it.
            self.stack.add_module(f"act{number}", nn.ReLU(inplace=number == 2))
            step = stride if number == 3 else 1
            made = SeparableConv(inputs, width, stride=step, dilation=rate, relu=False)
            self.stack.add_module(f"conv{number}", made)
            inputs = width

    def taps(self, features_BCS: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the second convolution gives, before the stride, and the unit's output."""
        stack_BCS, second_BCS = features_BCS, features_BCS
        for name, layer in self.stack.named_children():
            stack_BCS = layer(stack_BCS)
            if name == "conv2":
                second_BCS = stack_BCS
        skip_BCS = features_BCS if self.shortcut is None else self.shortcut(features_BCS)
        return second_BCS, torch.add(stack_BCS, skip_BCS)

    def forward(self, features_BCS: Tensor) -> Tensor:
        """Return (B, outputs, *S / stride) features."""
        return self.taps(features_BCS)[1]


class LastUnit(nn.Module):
    """Three separable convolutions with ReLU within, and no shortcut."""

    def __init__(self, inputs: int, unit: Unit, *, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.stack = nn.Sequential()
        for number, (width, rate) in enumerate(zip(unit.widths, rates, strict=True), start=1):
            made = SeparableConv(inputs, width, stride=1, dilation=rate, relu=True)
            self.stack.add_module(f"conv{number}", made)
            inputs = width

    def forward(self, features_BCS: Tensor) -> Tensor:
        """Return (B, outputs, *S) features."""
        result: Tensor = self.stack(features_BCS)
        return result


class XceptionTrunk(nn.Module):
    """Two plain convolutions and the units, dilated to an output stride."""

    low_channels, low_stride = 256, 4

    def __init__(
        self,
        units: tuple[Unit, ...],
        *,
        bands: int,
        output_stride: int,
        multi_grid: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            ConvNorm(bands, 32, kernel=3, stride=2, relu=True),
            ConvNorm(32, 64, kernel=3, stride=1, relu=True),
        )
        self.blocks = nn.Sequential()
        inputs, reached = 64, 2
        for unit, (stride, rate) in zip(units[:-1], _dilated(units, output_stride), strict=False):
            if (reached, unit.stride) == (self.low_stride, 2):
                self._low = len(self.blocks)
            reached *= stride
            self.blocks.append(XceptionUnit(inputs, unit, stride=stride, rates=(rate,) * 3))
            inputs = unit.widths[-1]
        *_, (_, rate) = _dilated(units, output_stride)
        rates = tuple(rate * factor for factor in multi_grid or (1, 1, 1))
        self.blocks.append(LastUnit(inputs, units[-1], rates=rates))
        self.channels = units[-1].widths[-1]

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Return (B, 2048, *S / stride) features."""
        return self.taps(image_BCS)[1]

    def taps(self, image_BCS: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, 256, *S / 4) low-level features, and those at the output stride.

        The low-level ones are those of the authors' release: from within the unit that leaves
        stride 4, before its last convolution.
        """
        features_BCS = low_BCS = self.stem(image_BCS)
        for number, block in enumerate(self.blocks):
            if number == self._low:
                assert isinstance(block, XceptionUnit)
                low_BCS, features_BCS = block.taps(features_BCS)
            else:
                features_BCS = block(features_BCS)
        return low_BCS, features_BCS


def _dilated(units: tuple[Unit, ...], output_stride: int) -> Iterator[tuple[int, int]]:
    """Stride and rate of each unit: once the output stride is reached, strides become rates."""
    stride, rate = 2, 1
    for unit in units:
        if stride < output_stride:
            yield unit.stride, rate
            stride *= unit.stride
        else:
            yield 1, rate
            rate *= unit.stride
