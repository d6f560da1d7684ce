"""Trunks: what turns an image (B, C, *S) into features at the output stride."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from pipeline.models.architecture import Architecture
from pipeline.models.medicalnet import MEDICALNETS, MedicalNetTrunk

_CONV: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM: dict[int, Callable[[int], nn.Module]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}

RESNETS: MappingProxyType[str, tuple[Any, tuple[int, ...]]] = MappingProxyType(
    {
        "resnet18": (BasicBlock, (2, 2, 2, 2)),
        "resnet50": (Bottleneck, (3, 4, 6, 3)),
        "resnet101": (Bottleneck, (3, 4, 23, 3)),
    }
)
"""Residual block of each ResNet, and how many of it make each of its four layers."""

SLIM_DILATIONS = MappingProxyType(
    {(2, 4): (1, 1, 2), (2, 8): (1, 1), (3, 2): (1, 1, 2), (3, 4): (1, 1)}
)
"""Dilation of each residual block of the slim trunk, by dimensions and output stride.

They leave room for an ASPP of rates up to 6 (strides 4 in 2-D, 2 in 3-D) or 2 (8 and 4) within a
halo of 64 px or 32 voxels.
"""

SLIM_WIDTH = MappingProxyType({2: 64, 3: 32})
"""Channels of the slim trunk, by dimensions."""


def conv(dims: int, inputs: int, outputs: int, *, kernel: int, dilation: int = 1) -> nn.Module:
    """A convolution without bias that keeps the size."""
    return _CONV[dims](
        inputs, outputs, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=False
    )


def norm(dims: int, channels: int) -> nn.Module:
    """Batch norm over ``channels``."""
    return _NORM[dims](channels)


def classify(dims: int, inputs: int, classes: int) -> nn.Module:
    """The last 1x1 convolution, with bias."""
    return _CONV[dims](inputs, classes, 1)


def conv_norm_relu(
    dims: int, inputs: int, outputs: int, *, kernel: int, dilation: int = 1
) -> list[nn.Module]:
    """The three layers nearly everything here is made of."""
    layers = [conv(dims, inputs, outputs, kernel=kernel, dilation=dilation)]
    return [*layers, norm(dims, outputs), nn.ReLU(inplace=True)]


class ResNetTrunk(ResNet):  # type: ignore[misc]
    """torchvision's ResNet up to ``layer4``, dilated to an output stride, for any bands."""

    def __init__(self, block: Any, depths: list[int], *, bands: int, output_stride: int) -> None:
        super().__init__(block, depths)
        del self.avgpool, self.fc
        if bands != 3:
            self.conv1 = nn.Conv2d(bands, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.channels = 512 * block.expansion
        if output_stride == 8:
            _trade_stride_for_dilation(self.layer3, before=1)
            _trade_stride_for_dilation(self.layer4, before=2)
        else:
            _trade_stride_for_dilation(self.layer4, before=1)

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Return (B, 512 x expansion, *S / stride) features."""
        stem_BCS = self.maxpool(self.relu(self.bn1(self.conv1(image_BCS))))
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(stem_BCS))))
        return features


def _trade_stride_for_dilation(stage: nn.Sequential, *, before: int) -> None:
    """Keep a stage's size: its strided convolution keeps the rate ``before``, later ones double it.

    As torchvision does for bottlenecks. Features then hold those of the strided stage at every
    second place, which is what lets published weights be used.
    """
    for layer in stage.modules():
        if isinstance(layer, nn.Conv2d):
            rate = before if layer.stride == (2, 2) else 2 * before
            layer.stride = (1, 1)
            if layer.kernel_size == (3, 3):
                layer.dilation = layer.padding = (rate, rate)


class SlimBlock(nn.Module):
    """Two 3x3 convolutions of one dilation, and the identity."""

    def __init__(self, dims: int, width: int, *, dilation: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*conv_norm_relu(dims, width, width, kernel=3, dilation=dilation))
        self.second = nn.Sequential(
            conv(dims, width, width, kernel=3, dilation=dilation), norm(dims, width)
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features_BCS: Tensor) -> Tensor:
        """Return features of the same shape."""
        result: Tensor = self.relu(torch.add(self.second(self.first(features_BCS)), features_BCS))
        return result


class SlimTrunk(nn.Sequential):
    """Strided 3x3 stem, then dilated residual blocks; the same in 2-D and 3-D."""

    def __init__(self, dims: int, *, bands: int, output_stride: int) -> None:
        width = SLIM_WIDTH[dims]
        halvings = output_stride.bit_length() - 1
        widths = [bands, *[width // 2] * (halvings - 1), width]
        stem: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            strided = _CONV[dims](inputs, outputs, 3, stride=2, padding=1, bias=False)
            stem += [strided, norm(dims, outputs), nn.ReLU(inplace=True)]
        blocks = [SlimBlock(dims, width, dilation=d) for d in SLIM_DILATIONS[dims, output_stride]]
        super().__init__(*stem, *blocks)
        self.channels = width


def build_trunk(
    architecture: Architecture, *, bands: int
) -> ResNetTrunk | SlimTrunk | MedicalNetTrunk:
    """The trunk an architecture names; its ``channels`` are those of its features."""
    stride = architecture.output_stride
    if architecture.backbone == "slim":
        return SlimTrunk(architecture.dims, bands=bands, output_stride=stride)
    if architecture.backbone in MEDICALNETS:
        return MedicalNetTrunk(architecture, bands=bands)
    block, depths = RESNETS[architecture.backbone]
    return ResNetTrunk(block, list(depths), bands=bands, output_stride=stride)
