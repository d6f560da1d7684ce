"""Atrous spatial pyramid pooling, as v3 has it (Chen et al. 2017, section 3.3), and v3+.

Axes in array names: B batch, C channel, K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.models.architecture import Architecture
from pipeline.models.blocks import conv, conv_norm_relu, mix, norm
from pipeline.models.context_pool import ContextPool
from pipeline.models.frame import Frame


class Aspp(nn.Module):
    """Parallel convolutions of several dilations and the image pooling, projected together."""

    def __init__(
        self, architecture: Architecture, *, inputs: int, width: int, dropout: float
    ) -> None:
        super().__init__()
        dims, split = architecture.dims, architecture.separable
        branches: list[nn.Module] = [nn.Sequential(*conv_norm_relu(dims, inputs, width, kernel=1))]
        branches += [
            nn.Sequential(
                *mix(dims, inputs, width, dilation=architecture.dilation(rate), separable=split)
            )
            for rate in architecture.rates
        ]
        if architecture.image_pooling:
            pointwise = conv(dims, inputs, width, kernel=1)
            branches.append(ContextPool(pointwise, norm(dims, width), stride=architecture.steps))
        self.convs = nn.ModuleList(branches)
        joined = conv_norm_relu(dims, len(branches) * width, width, kernel=architecture.projection)
        self.project = nn.Sequential(*joined, nn.Dropout(dropout))

    def forward(self, features_BCS: Tensor, frame: Frame) -> Tensor:
        """Return (B, width, *S) features."""
        branches = [
            branch(features_BCS, frame) if isinstance(branch, ContextPool) else branch(features_BCS)
            for branch in self.convs
        ]
        projected: Tensor = self.project(torch.cat(branches, dim=1))
        return projected
