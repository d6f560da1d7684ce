"""Image pooling of ASPP, made local, so that it does not depend on the tile.

Axes in array names: B batch, C channel, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.domain import Region, Shape
from pipeline.errors import RegionError
from pipeline.models.frame import Frame
from pipeline.models.geometry import per_axis

_AVERAGE: dict[int, Callable[..., Tensor]] = {2: F.avg_pool2d, 3: F.avg_pool3d}

Context = Literal["window", "scene", "tile"]
"""``window``: mean over the training crop around each place. ``scene``: mean over the whole scene.
``tile``: mean over what is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Where the windows of some places start, per axis, and how long they are, in features."""

    starts: tuple[tuple[int, ...], ...]
    span: Shape

    @property
    def reads(self) -> Region:
        """All that the windows cover."""
        ends = zip(self.starts, self.span, strict=True)
        return Region(
            tuple(first[0] for first in self.starts), tuple(first[-1] + n for first, n in ends)
        )

    def mean(self, features_BCS: Tensor, *, within: Region) -> Tensor:
        """Mean of each window: (B, C, *starts), a new array; the features lie ``within``."""
        kept = features_BCS.dtype
        # A sum over a window in bfloat16 would lose what lies beyond its 8 bits.
        mean_BCS = features_BCS.float() if kept in (torch.bfloat16, torch.float16) else features_BCS
        for axis, starts in enumerate(self.starts):
            # One axis at a time, each sum in the order of its window: a running sum would depend
            # on where the input starts.
            kernel = [span if other == axis else 1 for other, span in enumerate(self.span)]
            mean_BCS = _AVERAGE[len(kernel)](mean_BCS, kernel, stride=1)
            # Channels stay innermost in memory, as the convolutions want them.
            picked = torch.tensor(starts, device=mean_BCS.device) - within.start[axis]
            mean_BCS = mean_BCS.movedim(1, -1).index_select(axis + 1, picked).movedim(-1, 1)
        return mean_BCS.to(kept)


class WindowMean(nn.Module):
    """Mean of features over a window around each place, shifted to stay inside the scene."""

    def __init__(self, *, stride: int | tuple[int, ...]) -> None:
        """``stride``: pixels between neighbouring features, on all axes or on each."""
        super().__init__()
        self.stride = stride
        self.window: tuple[int, ...] | None = None
        """Side of the window per axis, in features, odd; None: mean over the whole input."""

    def steps(self, ndim: int) -> tuple[int, ...]:
        """Pixels between neighbouring features, per axis."""
        return per_axis(self.stride, ndim)

    @property
    def mode(self) -> Context:
        """``window`` where a window is set, else ``tile``."""
        return "tile" if self.window is None else "window"

    def forward(self, features_BCS: Tensor, frame: Frame) -> Tensor:
        """Return (B, C, *S) means, a new array; (B, C, 1, ..) without a window.

        Raises:
            RegionError: the input does not hold one whole window.
        """
        size = tuple(features_BCS.shape[2:])
        windows = self.windows(Region.whole(size), size=size, frame=frame)
        return windows.mean(features_BCS, within=Region.whole(size))

    def windows(self, places: Region, *, size: Shape, frame: Frame) -> Windows:
        """The windows of ``places`` of an input of ``size`` features, all in features of it.

        Raises:
            RegionError: the input does not hold one whole window.
        """
        axes = range(len(size))
        if self.window is None:
            return Windows(starts=tuple((0,) for _ in axes), span=size)
        return Windows(
            starts=tuple(
                tuple(
                    self._start(axis, place, size=size, frame=frame)
                    for place in range(places.start[axis], places.stop[axis])
                )
                for axis in axes
            ),
            span=tuple(self._length(axis, frame) for axis in axes),
        )

    def span(
        self, axis: int, first: int, stop: int, *, size: Shape, frame: Frame
    ) -> tuple[int, int]:
        """What the windows of places ``[first, stop)`` cover along ``axis``; raises as above."""
        if self.window is None:
            return 0, size[axis]
        ends = (self._start(axis, place, size=size, frame=frame) for place in (first, stop - 1))
        start, last = ends
        return start, last + self._length(axis, frame)

    def _length(self, axis: int, frame: Frame) -> int:
        """Of a window along ``axis``: no longer than the scene."""
        assert self.window is not None
        return min(self.window[axis], self._side(axis, frame))

    def _side(self, axis: int, frame: Frame) -> int:
        """The scene along ``axis``, in features."""
        return -(-frame.shape[axis] // self.steps(len(frame.shape))[axis])

    def _start(self, axis: int, place: int, *, size: Shape, frame: Frame) -> int:
        """Where in the input the window of ``place`` starts along ``axis``.

        Windows stay inside the scene; those of places in the halo, which nobody keeps, are moved to
        stay inside the input as well.
        """
        assert self.window is not None
        span, count = self._length(axis, frame), size[axis]
        if count < span:
            raise RegionError(
                f"image pooling needs a window of {span} features, the input holds {count};"
                " read what Reach.read asks for, or ask for context 'tile'"
            )
        origin = frame.origin[axis] // self.steps(len(size))[axis]
        start = min(max(origin + place - self.window[axis] // 2, 0), self._side(axis, frame) - span)
        return min(max(start - origin, 0), count - span)


class ContextPool(nn.Sequential):
    """The image-pooling branch: mean, 1x1 convolution, batch norm, ReLU (keys as torchvision's)."""

    def __init__(self, conv: nn.Module, norm: nn.Module, *, stride: int | tuple[int, ...]) -> None:
        super().__init__(WindowMean(stride=stride), conv, norm, nn.ReLU())

    @property
    def mean(self) -> WindowMean:
        """The layer that holds the window."""
        layer = self[0]
        assert isinstance(layer, WindowMean)
        return layer

    def forward(self, features_BCS: Tensor, frame: Frame) -> Tensor:  # type: ignore[override]
        """Return (B, C, *S): what the surroundings of each place say, at every place."""
        mean, conv, norm, relu = self
        pooled_BCS: Tensor
        size = (-1, -1, *features_BCS.shape[2:])
        if self.training:
            crop_BC1 = features_BCS.mean(dim=tuple(range(2, features_BCS.ndim)), keepdim=True)
            pooled_BCS = relu(norm(conv(crop_BC1)))
        else:
            # A mean commutes with a 1x1 convolution and with fixed batch norm, and there are
            # fewer channels after them.
            pooled_BCS = relu(mean(norm(conv(features_BCS)), frame))
        return pooled_BCS if pooled_BCS.shape[2:] == size[2:] else pooled_BCS.expand(size)


def window_features(crop: Sequence[int], *, steps: Sequence[int]) -> tuple[int, ...]:
    """Side of the window that stands for a training crop of ``crop`` px, in features, odd."""
    return tuple(side // step | 1 for side, step in zip(crop, steps, strict=True))
