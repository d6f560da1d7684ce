"""The loss of a network on each of its score maps, with the labels brought to their size.

v1 and v2 train on coarse scores and shrink the labels (Chen et al. 2015, section 3.2; 2017, section
4.1); v3 and v3+ enlarge the logits and leave the labels whole (Chen et al. 2017b, section 4.1).
Axes in array names: B batch, K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.domain import Shape


def score_loss(maps: Iterable[Tensor], label_BS: Tensor, *, ignore_index: int) -> Tensor:
    """Sum over the maps of the mean cross entropy of their labelled places, in nats; a scalar.

    Args:
        maps: (B, K, *S') scores each, as ``DeepLab.score_maps`` gives them.
        label_BS: (B, *S) int64 class indices.
        ignore_index: label that counts nowhere. A map that keeps no other adds 0.
    """
    total = torch.zeros((), device=label_BS.device)
    for scores_BKS in maps:
        shrunk_BS = shrink_labels(label_BS, tuple(scores_BKS.shape[2:]))
        if (shrunk_BS != ignore_index).any():
            scores_BKS = scores_BKS.float()
            total = total + F.cross_entropy(scores_BKS, shrunk_BS, ignore_index=ignore_index)
    return total


def shrink_labels(label_BS: Tensor, size: Shape) -> Tensor:
    """Return the (B, *size) labels at the places of a map whose corners are the labels' own.

    At stride 8 that is every eighth label. Places between two labels take the nearest, the later
    one of two that are equally near.
    """
    for axis, (side, places) in enumerate(zip(label_BS.shape[1:], size, strict=True), start=1):
        if places != side:
            steps = max(1, places - 1)
            place = torch.arange(places, device=label_BS.device)
            nearest = (2 * place * (side - 1) + steps) // (2 * steps)
            label_BS = label_BS.index_select(axis, nearest)
    return label_BS
