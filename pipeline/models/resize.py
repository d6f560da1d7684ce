"""Linear resampling by a whole fraction, of both corner conventions.

Axes in array names: B batch, C channel, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.domain import Shape

_MODE = {2: "bilinear", 3: "trilinear"}


class Resize(nn.Module):
    """Linear interpolation to ``up / down`` of the size, as ``F.interpolate`` does it.

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
        return F.interpolate(
            features_BCS,
            size=self.size(tuple(features_BCS.shape[2:])),
            mode=_MODE[len(self.up)],
            align_corners=self.align_corners,
        )

    def extra_repr(self) -> str:
        """What print shows."""
        return f"up={self.up}, down={self.down}, align_corners={self.align_corners}"
