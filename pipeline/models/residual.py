"""What residual units do, and those of 2-D ResNets, key for key torchvision's.

He et al. 2015 (arXiv 1512.03385), figure 5; a bottleneck has its stride in the 3x3 convolution.
Written here because importing torchvision loads torch's compiler: 1.6 s and 90 MiB (measured) of
every process that has a network.
Axes in array names: B batch, C channel, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from pipeline.models.blocks import conv, norm


class ResidualUnit(nn.Module, ABC):
    """What is added to the input, or to ``downsample`` of it, before a ReLU."""

    expansion: int
    """Channels that come out over ``width``."""

    relu: nn.Module
    downsample: nn.Module | None

    @abstractmethod
    def residual(self, features_BCS: Tensor) -> Tensor:
        """(B, expansion x width, *S), a new tensor."""

    def forward(self, features_BCS: Tensor) -> Tensor:
        """Return (B, expansion x width, *S / stride) features."""
        sum_BCS, shortcut_BCS = self.residual(features_BCS), features_BCS
        if self.downsample is not None:
            shortcut_BCS = self.downsample(features_BCS)
        sum_BCS += shortcut_BCS
        result_BCS: Tensor = self.relu(sum_BCS)
        return result_BCS


class BasicUnit(ResidualUnit):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(
        self, inputs: int, width: int, *, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = _strided(inputs, width, stride)
        self.bn1 = norm(2, width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(2, width, width, kernel=3)
        self.bn2 = norm(2, width)
        self.downsample = downsample  # last, as there: fresh weights are drawn in this order

    def residual(self, features_BCS: Tensor) -> Tensor:
        """As ``ResidualUnit.residual``."""
        inner_BCS = self.relu(self.bn1(self.conv1(features_BCS)))
        result_BCS: Tensor = self.bn2(self.conv2(inner_BCS))
        return result_BCS


class Bottleneck(ResidualUnit):
    """A 3x3 convolution between two of 1x1, of fewer channels than come in."""

    expansion = 4

    def __init__(
        self, inputs: int, width: int, *, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = conv(2, inputs, width, kernel=1)
        self.bn1 = norm(2, width)
        self.conv2 = _strided(width, width, stride)
        self.bn2 = norm(2, width)
        self.conv3 = conv(2, width, 4 * width, kernel=1)
        self.bn3 = norm(2, 4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def residual(self, features_BCS: Tensor) -> Tensor:
        """As ``ResidualUnit.residual``."""
        inner_BCS = self.relu(self.bn1(self.conv1(features_BCS)))
        inner_BCS = self.relu(self.bn2(self.conv2(inner_BCS)))
        result_BCS: Tensor = self.bn3(self.conv3(inner_BCS))
        return result_BCS


def _strided(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
