"""DeepLab v2: atrous spatial pyramid pooling, as scores that are summed.

Chen et al. 2017 (arXiv 1606.00915), sections 3.2 and 4.1; figure 7.
Axes in array names: B batch, C channel, K class, S space (y, x).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.models.architecture import Architecture
from pipeline.models.frame import Frame
from pipeline.models.multi_scale import MultiScale
from pipeline.models.network import DeepLab
from pipeline.models.resize import Resize
from pipeline.models.vgg import FcBranch, VggTrunk, classifier

if TYPE_CHECKING:
    from pipeline.models.msra import MsraTrunk


class SummedAspp(nn.ModuleList):
    """Branches of several dilations, each with its own classifier; one branch is LargeFOV."""

    def forward(self, features_BCS: Tensor) -> Tensor:
        """Return (B, K, *S) scores."""
        first, *others = self
        scores_BKS: Tensor = first(features_BCS)
        for branch in others:
            scores_BKS = torch.add(scores_BKS, branch(features_BCS))
        return scores_BKS


class DeepLabV2(DeepLab):
    """VGG-16 or ResNet-101; with ``multi_scale: inputs`` on the image at three sizes (MSC)."""

    def __init__(self, architecture: Architecture, *, bands: int, classes: int) -> None:
        super().__init__(architecture, bands=bands, classes=classes)
        self.backbone: VggTrunk | MsraTrunk
        rates = architecture.rates
        if architecture.backbone == "vgg16":
            self.backbone = VggTrunk(bands=bands)
            inputs = self.backbone.channels
            self.aspp = SummedAspp(FcBranch(inputs, classes, rate=rate) for rate in rates)
        else:  # torchvision's, which takes long to import
            from pipeline.models.msra import MsraTrunk

            self.backbone = MsraTrunk(bands=bands)
            inputs = self.backbone.channels
            self.aspp = SummedAspp(
                classifier(inputs, classes, kernel=3, rate=rate) for rate in rates
            )
        self.scales = MultiScale() if architecture.multi_scale is not None else None
        self.stride = 8 if self.scales is None else self.scales.stride
        self.upsample = Resize.by(8, 2, align_corners=True)

    def coarse_logits(self, image_BCS: Tensor, frame: Frame) -> Tensor:
        """Return (B, K, *S) logits at every eighth pixel."""
        return self.score_maps(image_BCS, frame)[-1]

    def score_maps(self, image_BCS: Tensor, frame: Frame) -> tuple[Tensor, ...]:
        """As ``DeepLab.score_maps``: the coarse logits, to whose size the labels shrink.

        With multi-scale inputs those of scales 1, 3/4 and 1/2 come before their maximum, each with
        a loss of its own (section 4.1.2).
        """
        if self.scales is None:
            return (self._scores(image_BCS),)
        maps: tuple[Tensor, ...] = self.scales(image_BCS, self._scores)
        return maps

    def _scores(self, image_BCS: Tensor) -> Tensor:
        scores_BKS: Tensor = self.aspp(self.backbone(image_BCS))
        return scores_BKS

    @property
    def last_layers(self) -> tuple[nn.Module, ...]:
        """As ``DeepLab.last_layers``."""
        return tuple(b.fc8 if isinstance(b, FcBranch) else b for b in self.aspp)
