"""A small trunk with a small halo, the same in 2-D and 3-D.

Axes in array names: B batch, C channel, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor, nn

from pipeline.models.architecture import Architecture
from pipeline.models.blocks import CONV, Rate, axis_strides, conv, conv_norm_relu, norm

DILATIONS = MappingProxyType({(2, 4): (1, 1, 2), (2, 8): (1, 1), (3, 2): (1, 1, 2), (3, 4): (1, 1)})
"""Dilation of each residual block, by dimensions and output stride.

They leave room for an ASPP of rates up to 6 (strides 4 in 2-D, 2 in 3-D) or 2 (8 and 4) within a
halo of 64 px or 32 voxels.
"""

SLIM_WIDTH = MappingProxyType({2: 64, 3: 32})
"""Channels, by dimensions."""


class SlimBlock(nn.Module):
    """Two 3x3 convolutions of one dilation, and the identity."""

    def __init__(self, dims: int, width: int, *, dilation: Rate) -> None:
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
    """Strided 3x3 stem, then dilated residual blocks; along z as an architecture has them."""

    def __init__(self, architecture: Architecture, *, bands: int) -> None:
        dims, width = architecture.dims, SLIM_WIDTH[architecture.dims]
        strides = axis_strides(architecture.steps)
        widths = [bands, *[width // 2] * (len(strides) - 1), width]
        stem: list[nn.Module] = []
        for (inputs, outputs), stride in zip(pairwise(widths), strides, strict=True):
            strided = CONV[dims](inputs, outputs, 3, stride=stride, padding=1, bias=False)
            stem += [strided, norm(dims, outputs), nn.ReLU(inplace=True)]
        rates = map(architecture.dilation, DILATIONS[dims, architecture.output_stride])
        super().__init__(*stem, *(SlimBlock(dims, width, dilation=rate) for rate in rates))
        self.channels = width
        self.low_channels = widths[-2]
        self.low_stride = tuple(
            a // b for a, b in zip(architecture.steps, strides[-1], strict=True)
        )
        self._low = len(stem) - 3

    def taps(self, image_BCS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features before the last stride, and those at the output stride."""
        features_BCS = low_BCS = image_BCS
        for number, layer in enumerate(self):
            if number == self._low:
                low_BCS = features_BCS
            features_BCS = layer(features_BCS)
        return low_BCS, features_BCS
