"""DeepLab v1: VGG-16 with a large field of view, LargeFOV.

Chen et al. 2015 (arXiv 1412.7062), sections 3.1 and 4.3; layers as in the release.
Axes in array names: B batch, C channel, K class, S space (y, x).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.models.architecture import Architecture
from pipeline.models.frame import Frame
from pipeline.models.network import DeepLab
from pipeline.models.resize import Resize
from pipeline.models.vgg import FcBranch, VggTrunk, classifier, start

_MLP_WIDTH = 128


class DeepLabV1(DeepLab):
    """LargeFOV; with ``multi_scale: features`` also the scores of five finer layers (MSc)."""

    stride = 8

    def __init__(self, architecture: Architecture, *, bands: int, classes: int) -> None:
        super().__init__(architecture, bands=bands, classes=classes)
        self.backbone = VggTrunk(bands=bands)
        self.pool5a = nn.AvgPool2d(3, stride=1, padding=1)
        (rate,) = architecture.rates
        self.head = FcBranch(self.backbone.channels, classes, rate=rate)
        multi_scale = architecture.multi_scale is not None
        self.finer = FinerScores(bands, classes) if multi_scale else None
        self.upsample = Resize.by(1 if multi_scale else 8, 2, align_corners=True)

    def coarse_logits(self, image_BCS: Tensor, frame: Frame) -> Tensor:
        """Return (B, K, *S) logits at every eighth pixel; at every pixel where multi-scale."""
        pooled = self.backbone.pooled(image_BCS)
        scores_BKS: Tensor = self.head(self.pool5a(pooled[-1]))
        if self.finer is not None:
            scores_BKS = self.finer(image_BCS, pooled, scores_BKS)
        return scores_BKS

    def score_maps(self, image_BCS: Tensor, frame: Frame) -> tuple[Tensor, ...]:
        """As ``DeepLab.score_maps``: the coarse logits, to whose size the labels shrink."""
        return (self.coarse_logits(image_BCS, frame),)

    @property
    def last_layers(self) -> tuple[nn.Module, ...]:
        """As ``DeepLab.last_layers``."""
        finer = () if self.finer is None else self.finer.last_layers
        return (self.head.fc8, *finer)


class FinerScores(nn.Module):
    """Scores of the image and of the first four pools, added to the network's (section 4.3).

    The paper gives the classifier 5 x 128 more channels. As in the release each resolution has
    its own part of that classifier and the scores are resized, not the channels: the same, as
    both are linear, at a fraction of the memory.
    """

    def __init__(self, bands: int, classes: int) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(_mlp(inputs, classes) for inputs in (bands, 64, 128, 256, 512))
        self.resizes = nn.ModuleList(Resize.by(f, 2, align_corners=True) for f in (2, 4, 8))

    def forward(self, image_BCS: Tensor, pooled: list[Tensor], scores_BKS: Tensor) -> Tensor:
        """Return (B, K, *S) scores at every pixel, for those given at every eighth."""
        inputs = (image_BCS, *pooled[:4])
        parts: list[Tensor] = [mlp(part) for mlp, part in zip(self.mlps, inputs, strict=True)]
        fine, half, quarter, *eighths = parts
        for part_BKS in eighths:
            scores_BKS = torch.add(scores_BKS, part_BKS)
        for resize, part_BKS in zip(self.resizes, (half, quarter, scores_BKS), strict=True):
            fine = torch.add(fine, resize(part_BKS))
        return fine

    @property
    def last_layers(self) -> tuple[nn.Module, ...]:
        """As ``DeepLab.last_layers``, those of this part."""
        return tuple(list(mlp.children())[-1] for mlp in self.mlps)


def _mlp(inputs: int, classes: int) -> nn.Sequential:
    """Two layers of 128 channels, and their part of the classifier."""
    return nn.Sequential(
        start(nn.Conv2d(inputs, _MLP_WIDTH, 3, padding=1)),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        start(nn.Conv2d(_MLP_WIDTH, _MLP_WIDTH, 1)),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        classifier(_MLP_WIDTH, classes, kernel=1),
    )
