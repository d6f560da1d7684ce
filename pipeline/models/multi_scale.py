"""One network on an image of several sizes (Chen et al. 2017, arXiv 1606.00915, section 4.1.2).

Axes in array names: B batch, C channel, K class, S space (y, x).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.models.resize import Resize

_SCALES = ((3, 4), (1, 2))
"""Scales besides 1, as (up, down)."""


class MultiScale(nn.Module):
    """Scores of the image at scales 1, 3/4 and 1/2, and their maximum; holds no weights.

    Sides are 32k + 1 px: at a half of that, a network of stride 8 still samples every place at a
    whole pixel.
    """

    stride = 32

    def __init__(self) -> None:
        super().__init__()
        self.shrinks = nn.ModuleList(_resize(up, down) for up, down in _SCALES)
        self.grows = nn.ModuleList(_resize(down, up) for up, down in _SCALES)

    def forward(self, image_BCS: Tensor, scores: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """Return the (B, K, *S') scores of each scale at its own resolution, and their maximum.

        The maximum, over the scores resized to those of scale 1, comes last.
        """
        most_BKS = full_BKS = scores(image_BCS)
        smaller = []
        for shrink, grow in zip(self.shrinks, self.grows, strict=True):
            part_BKS = scores(shrink(image_BCS))
            most_BKS = torch.maximum(most_BKS, grow(part_BKS))
            smaller.append(part_BKS)
        return (full_BKS, *smaller, most_BKS)


def _resize(up: int, down: int) -> Resize:
    return Resize((up, up), (down, down), align_corners=True)
