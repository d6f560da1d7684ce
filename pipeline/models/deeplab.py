"""DeepLabV3: a trunk, atrous spatial pyramid pooling, and bilinear upsampling.

Chen et al. 2017 (arXiv 1706.05587). The ResNet forms have torchvision's layout, key for key.
Axes in array names: B batch, C channel, K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

from pipeline.models.architecture import Architecture
from pipeline.models.context_pool import ContextPool, window_features
from pipeline.models.frame import Frame
from pipeline.models.resize import Resize
from pipeline.models.trunks import (
    RESNETS,
    SLIM_WIDTH,
    build_trunk,
    classify,
    conv,
    conv_norm_relu,
    norm,
)


class Aspp(nn.Module):
    """Parallel convolutions of several dilations and the image pooling, projected together."""

    def __init__(
        self, architecture: Architecture, *, inputs: int, width: int, dropout: float
    ) -> None:
        super().__init__()
        dims = architecture.dims
        branches: list[nn.Module] = [nn.Sequential(*conv_norm_relu(dims, inputs, width, kernel=1))]
        branches += [
            nn.Sequential(*conv_norm_relu(dims, inputs, width, kernel=3, dilation=rate))
            for rate in architecture.rates
        ]
        if architecture.image_pooling:
            pointwise = conv(dims, inputs, width, kernel=1)
            branches.append(ContextPool(pointwise, norm(dims, width), stride=architecture.steps))
        self.convs = nn.ModuleList(branches)
        self.project = nn.Sequential(
            *conv_norm_relu(dims, len(branches) * width, width, kernel=1), nn.Dropout(dropout)
        )

    def forward(self, features_BCS: Tensor, frame: Frame) -> Tensor:
        """Return (B, width, *S) features."""
        branches = [
            branch(features_BCS, frame) if isinstance(branch, ContextPool) else branch(features_BCS)
            for branch in self.convs
        ]
        projected: Tensor = self.project(torch.cat(branches, dim=1))
        return projected


class Head(nn.Sequential):
    """ASPP, unless it is of an FCN, and the classifier, at the output stride."""

    def forward(self, features_BCS: Tensor, frame: Frame) -> Tensor:  # type: ignore[override]
        """Return (B, K, *S) logits."""
        for layer in self:
            features_BCS = (
                layer(features_BCS, frame) if isinstance(layer, Aspp) else layer(features_BCS)
            )
        return features_BCS


def aspp_width(architecture: Architecture) -> int:
    """Channels of every branch of ASPP, and so of the mean of image pooling."""
    return SLIM_WIDTH[architecture.dims] if architecture.backbone == "slim" else 256


class DeepLab(nn.Module):
    """A network whose tiles agree with the whole scene, given its reach (``reach_of``)."""

    def __init__(self, architecture: Architecture, *, bands: int, classes: int) -> None:
        super().__init__()
        dims = architecture.dims
        self.architecture, self.bands, self.classes = architecture, bands, classes
        self.backbone = build_trunk(architecture, bands=bands)
        inputs, width = self.backbone.channels, aspp_width(architecture)
        if architecture.family == "fcn":
            self.classifier = Head(*FCNHead(inputs, classes))
        elif architecture.backbone not in RESNETS:
            aspp = Aspp(architecture, inputs=inputs, width=width, dropout=0.1)
            self.classifier = Head(aspp, classify(dims, width, classes))
        else:
            aspp = Aspp(architecture, inputs=inputs, width=width, dropout=0.5)
            smooth = conv_norm_relu(dims, width, width, kernel=3)
            self.classifier = Head(aspp, *smooth, classify(dims, width, classes))
        self.upsample = Resize(architecture.steps, (1,) * dims, align_corners=False)

    def forward(self, image_BCS: Tensor, frame: Frame) -> Tensor:
        """Return (B, K, *S) logits at the input's size, which are multiples of the stride."""
        logits_BKS: Tensor = self.upsample(self.coarse_logits(image_BCS, frame))
        return logits_BKS

    def coarse_logits(self, image_BCS: Tensor, frame: Frame) -> Tensor:
        """Return (B, K, *S / stride) logits at the output stride."""
        logits_BKS: Tensor = self.classifier(self.backbone(image_BCS), frame)
        return logits_BKS

    @property
    def stride(self) -> int:
        """Pixels that tile origins are multiples of."""
        return self.architecture.output_stride

    @property
    def pool(self) -> ContextPool | None:
        """The image-pooling branch; None for a network without one."""
        return next((part for part in self.modules() if isinstance(part, ContextPool)), None)

    def pool_over(self, crop: Sequence[int] | None) -> Self:
        """Pool over windows of the training crop, in px; over all that is read where None."""
        if self.pool is not None:
            steps = self.architecture.steps
            window = None if crop is None else window_features(crop, steps=steps)
            self.pool.mean.window = window
        return self


def build_network(architecture: Architecture, *, bands: int, classes: int) -> DeepLab:
    """A network with fresh weights, in training mode; image pooling over all that is read."""
    return DeepLab(architecture, bands=bands, classes=classes)
