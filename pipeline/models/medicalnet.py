"""Dilated residual trunks for volumes, in the layout of MedicalNet.

Chen, Ma and Zheng 2019 (arXiv 1904.00625, section 3.2): output stride 8, the third layer dilated by
2 and the fourth by 4. The keys are those of its published files once ``module.`` is taken off.

Axes in array names: B batch, C channel, S space, (z, y, x).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.architecture import Architecture
from pipeline.models.blocks import CONV, Rate, axis_strides
from pipeline.models.geometry import per_axis
from pipeline.models.residual import ResidualUnit


class Block(ResidualUnit):
    """A residual unit whose shortcut comes before its convolutions: weights are drawn so."""

    def __init__(self, *, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.relu, self.downsample = nn.ReLU(inplace=True), shortcut


class Basic(Block):
    """Two 3x3x3 convolutions."""

    expansion = 1

    def __init__(
        self, inputs: int, width: int, *, stride: Any, rate: Rate, shortcut: nn.Module | None
    ) -> None:
        super().__init__(shortcut=shortcut)
        self.conv1 = _conv(inputs, width, 3, stride=stride, rate=rate)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = _conv(width, width, 3, rate=rate)
        self.bn2 = nn.BatchNorm3d(width)

    def residual(self, features_BCS: Tensor) -> Tensor:
        """As ``ResidualUnit.residual``."""
        inner_BCS = self.relu(self.bn1(self.conv1(features_BCS)))
        result: Tensor = self.bn2(self.conv2(inner_BCS))
        return result


class Narrow(Block):
    """A 3x3x3 convolution between two of 1x1x1, of fewer channels than come in."""

    expansion = 4

    def __init__(
        self, inputs: int, width: int, *, stride: Any, rate: Rate, shortcut: nn.Module | None
    ) -> None:
        super().__init__(shortcut=shortcut)
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = _conv(width, width, 3, stride=stride, rate=rate)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = _conv(width, 4 * width, 1)
        self.bn3 = nn.BatchNorm3d(4 * width)

    def residual(self, features_BCS: Tensor) -> Tensor:
        """As ``ResidualUnit.residual``."""
        inner_BCS = self.relu(self.bn1(self.conv1(features_BCS)))
        inner_BCS = self.relu(self.bn2(self.conv2(inner_BCS)))
        result: Tensor = self.bn3(self.conv3(inner_BCS))
        return result


MEDICALNETS: MappingProxyType[str, tuple[Any, tuple[int, ...], bool]] = MappingProxyType(
    {
        "medicalnet10": (Basic, (1, 1, 1, 1), True),
        "medicalnet18": (Basic, (2, 2, 2, 2), False),
        "medicalnet34": (Basic, (3, 4, 6, 3), False),
        "medicalnet50": (Narrow, (3, 4, 6, 3), True),
    }
)
"""Block of each trunk, how many make each of its four layers, and whether shortcuts are learnt."""


class MedicalNetTrunk(nn.Module):
    """The trunk up to ``layer4``, for any bands, its steps along z as an architecture has them."""

    def __init__(self, architecture: Architecture, *, bands: int) -> None:
        super().__init__()
        block, depths, learnt = MEDICALNETS[architecture.backbone]
        first, second, third = strides = axis_strides(architecture.steps)
        self.conv1 = _conv(bands, 64, 7, stride=first)
        self.bn1 = nn.BatchNorm3d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d(3, stride=second, padding=1)
        inputs = [64, *(width * block.expansion for width in (64, 128, 256, 512))]
        rates = map(architecture.dilation, (1, 1, 2, 4))
        plan = zip(pairwise(inputs), depths, (1, third, 1, 1), rates, strict=True)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(
                *_units(block, widths, depth=depth, stride=stride, rate=rate, learnt=learnt)
            )
            for widths, depth, stride, rate in plan
        )
        self.channels, self.low_channels = inputs[-1], inputs[1]
        self.low_stride = tuple(
            a // b for a, b in zip(architecture.steps, strides[-1], strict=True)
        )

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Return (B, 512 x expansion, *S) features, ``Architecture.steps`` voxels apart."""
        return self.taps(image_BCS)[1]

    def taps(self, image_BCS: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, low_channels, *S / 4) low-level features, and those at the output stride."""
        stem_BCS = self.maxpool(self.relu(self.bn1(self.conv1(image_BCS))))
        low_BCS: Tensor = self.layer1(stem_BCS)
        features_BCS: Tensor = self.layer4(self.layer3(self.layer2(low_BCS)))
        return low_BCS, features_BCS


def _units(
    block: Any, widths: tuple[int, int], *, depth: int, stride: Any, rate: Rate, learnt: bool
) -> Iterator[nn.Module]:
    """The blocks of a layer; the first has the stride, and a shortcut where it changes anything."""
    before, after = widths
    for number in range(depth):
        shortcut: nn.Module | None = None
        if number == 0 and (stride != 1 or before != after):
            if learnt:
                layers = _conv(before, after, 1, stride=stride), nn.BatchNorm3d(after)
                shortcut = nn.Sequential(*layers)
            else:
                shortcut = _pick(before, after, stride=stride)
        yield block(
            before if number == 0 else after,
            after // block.expansion,
            stride=stride if number == 0 else 1,
            rate=rate,
            shortcut=shortcut,
        )


def _pick(inputs: int, outputs: int, *, stride: Any) -> nn.Conv3d:
    """A shortcut that learns nothing: every ``stride``-th place, and zeros for new channels.

    As a convolution with weights of 1 and 0, which are no parameters and in no file.
    """
    layer = _conv(inputs, outputs, 1, stride=stride)
    ones = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", ones, persistent=False)
    _fill(layer)
    # A network that was made without memory gets its values when it is loaded.
    layer.register_load_state_dict_pre_hook(_fill)  # type: ignore[no-untyped-call]
    return layer


def _fill(layer: nn.Module, *_: Any) -> None:
    """Write the ones and zeros of ``_pick``."""
    assert isinstance(layer, nn.Conv3d)
    with torch.no_grad():
        if layer.weight.is_meta:
            layer.weight = torch.empty(layer.weight.shape)
        nn.init.dirac_(layer.weight)


def _conv(inputs: int, outputs: int, kernel: int, *, stride: Any = 1, rate: Rate = 1) -> nn.Conv3d:
    rates = per_axis(rate, 3)
    padding = tuple(kernel // 2 * dilation for dilation in rates)
    layer = CONV[3](
        inputs, outputs, kernel, stride=stride, padding=padding, dilation=rates, bias=False
    )
    assert isinstance(layer, nn.Conv3d)
    return layer
