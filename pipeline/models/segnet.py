"""SegNet: VGG-16 with batch norm, and its mirror image, which puts maxima back where they were.

Badrinarayanan, Kendall and Cipolla 2017 (arXiv 1511.00561), section 3; widths as released.
Axes in array names: B batch, C channel, K class, S space (y, x).
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

_STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))
"""Convolutions of each stage of the encoder, and their channels, in those of the first."""


class SegNet(nn.Module):
    """Five halvings that remember where each maximum was, and five unpoolings that use it.

    The encoder has the keys of torchvision's ``vgg16_bn().features``. Where two values nearly tie
    for the maximum, rounding decides to which of two places a feature goes back: unlike DeepLab's,
    logits of other kernels (more threads, another memory layout) are far off at such places.
    """

    def __init__(self, bands: int, classes: int, width: int = 64) -> None:
        """``width``: channels of the first stage, 64 as published."""
        super().__init__()
        layers: list[nn.Module] = []
        inputs = bands
        for depth, factor in _STAGES:
            layers += _convolutions([inputs, *[factor * width] * depth])
            layers.append(nn.MaxPool2d(2, return_indices=True))
            inputs = factor * width
        self.encoder = nn.Sequential(*layers)
        # A stage ends with the channels of the one it meets next.
        ends = [width, *(factor * width for _, factor in _STAGES[:-1])]
        stages = [
            nn.Sequential(*_convolutions([*[factor * width] * depth, end]))
            for (depth, factor), end in zip(_STAGES, ends, strict=True)
        ]
        stages[0] = nn.Sequential(
            *_convolutions([width, width]), nn.Conv2d(width, classes, 3, padding=1)
        )
        self.decoder = nn.ModuleList(reversed(stages))

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Return (B, K, *S) logits; sides are multiples of 32 px."""
        features_BCS, places = image_BCS, []
        for layer in self.encoder:
            if isinstance(layer, nn.MaxPool2d):
                features_BCS, place_BCS = layer(features_BCS)
                places.append(place_BCS)
            else:
                features_BCS = layer(features_BCS)
        for stage in self.decoder:
            features_BCS = stage(F.max_unpool2d(features_BCS, places.pop(), (2, 2)))
        return features_BCS


def _convolutions(widths: list[int]) -> list[nn.Module]:
    """3x3 convolutions from each width to the next, with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return layers
