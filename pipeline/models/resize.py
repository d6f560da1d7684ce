"""Linear resampling by a whole fraction, of both corner conventions.

Axes in array names: B batch, C channel, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.domain import Shape

_MODE = {2: "bilinear", 3: "trilinear"}


class Resize(nn.Module):
    """Linear interpolation to ``up / down`` of the size, at the places of ``F.interpolate``.

    Without ``align_corners`` a side of n becomes n * up / down; n is a multiple of ``down``. With
    it, the first and the last element stay where they are and a side of n becomes
    (n - 1) * up / down + 1; n - 1 is a multiple of ``down``. Where sides are so, and only there,
    an element's place does not depend on the size: what is needed for tiles to agree.
    """

    def __init__(self, up: Sequence[int], down: Sequence[int], *, align_corners: bool) -> None:
        """Resample by ``up / down`` per axis, (y, x) or (z, y, x)."""
        super().__init__()
        self.up, self.down, self.align_corners = tuple(up), tuple(down), align_corners

    @classmethod
    def by(cls, factor: int, dims: int, *, align_corners: bool) -> Resize:
        """Up by one whole factor on all axes."""
        return cls((factor,) * dims, (1,) * dims, align_corners=align_corners)

    def size(self, size: Shape) -> Shape:
        """The size that an input of ``size`` is brought to."""
        end = int(self.align_corners)
        rows = zip(size, self.up, self.down, strict=True)
        return tuple((n - end) * up // down + end for n, up, down in rows)

    def forward(self, features_BCS: Tensor) -> Tensor:
        """Return (B, C, *S') features."""
        size = self.size(tuple(features_BCS.shape[2:]))
        if all(up & (up - 1) == 0 for up in self.up):
            return F.interpolate(
                features_BCS,
                size=size,
                mode=_MODE[len(self.up)],
                align_corners=self.align_corners,
            )
        # torch finds a place as its number times down / up, in float32: by a third of a weight in
        # a hundred at 16,000 px, where that fraction is none of float32's.
        for axis, side in enumerate(size):
            features_BCS = self._along(features_BCS, axis, side)
        return features_BCS

    def _along(self, features_BCS: Tensor, axis: int, side: int) -> Tensor:
        """Resized to ``side`` along one axis of space, with places in whole numbers."""
        up, down, last = self.up[axis], self.down[axis], features_BCS.shape[2 + axis] - 1
        place = torch.arange(side, device=features_BCS.device)
        parts = up if self.align_corners else 2 * up
        place = place * down if self.align_corners else ((2 * place + 1) * down - up).clamp(min=0)
        below = place // parts
        shape = [side if n == 2 + axis else 1 for n in range(features_BCS.ndim)]
        weight = ((place % parts).to(features_BCS.dtype) / parts).reshape(shape)
        first_BCS = features_BCS.index_select(2 + axis, below)
        second_BCS = features_BCS.index_select(2 + axis, (below + 1).clamp(max=last))
        return torch.lerp(first_BCS, second_BCS, weight)

    def extra_repr(self) -> str:
        """What print shows."""
        return f"up={self.up}, down={self.down}, align_corners={self.align_corners}"
