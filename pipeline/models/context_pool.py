"""Image pooling of ASPP, made local, so that it does not depend on the tile.

Axes in array names: B batch, C channel, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import RegionError
from pipeline.models.frame import Frame

_AVERAGE: dict[int, Callable[..., Tensor]] = {2: F.avg_pool2d, 3: F.avg_pool3d}

Context = Literal["window", "tile"]
"""``window``: mean over the training crop around each place. ``tile``: mean over what is read."""


class WindowMean(nn.Module):
    """Mean of features over a window around each place, shifted to stay inside the scene."""

    def __init__(self, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.window: tuple[int, ...] | None = None
        """Side of the window per axis, in features, odd; None: mean over the whole input."""

    @property
    def mode(self) -> Context:
        """``window`` where a window is set, else ``tile``."""
        return "tile" if self.window is None else "window"

    def forward(self, features_BCS: Tensor, frame: Frame) -> Tensor:
        """Return (B, C, *S) means, a new array; (B, C, 1, ..) without a window.

        Raises:
            RegionError: the input does not hold one whole window.
        """
        axes = range(2, features_BCS.ndim)
        if self.window is None:
            return features_BCS.mean(dim=tuple(axes), keepdim=True)
        kept = features_BCS.dtype
        # A sum over a window in bfloat16 would lose what lies beyond its 8 bits.
        mean_BCS = features_BCS.float() if kept in (torch.bfloat16, torch.float16) else features_BCS
        for axis, origin, length, window in zip(
            axes, frame.origin, frame.shape, self.window, strict=True
        ):
            first, side = origin // self.stride, length // self.stride
            span = min(window, side)
            starts = _window_starts(first, mean_BCS.shape[axis], side=side, window=window)
            # One axis at a time, each sum in the order of its window: a running sum would depend
            # on where the input starts.
            kernel = [span if other == axis else 1 for other in axes]
            mean_BCS = _AVERAGE[len(kernel)](mean_BCS, kernel, stride=1)
            # Channels stay innermost in memory, as the convolutions want them.
            mean_BSC = mean_BCS.movedim(1, -1).index_select(axis - 1, starts.to(mean_BCS.device))
            mean_BCS = mean_BSC.movedim(-1, 1)
        return mean_BCS.to(kept)


class ContextPool(nn.Sequential):
    """The image-pooling branch: mean, 1x1 convolution, batch norm, ReLU (keys as torchvision's)."""

    def __init__(self, conv: nn.Module, norm: nn.Module, *, stride: int) -> None:
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


def window_features(crop: Sequence[int], *, stride: int) -> tuple[int, ...]:
    """Side of the window that stands for a training crop of ``crop`` px, in features, odd."""
    return tuple(side // stride | 1 for side in crop)


def _window_starts(first: int, count: int, *, side: int, window: int) -> Tensor:
    """Where in the input the window of each of its ``count`` features starts.

    Windows stay inside the scene's ``side`` features; those of features in the halo, which nobody
    keeps, are moved to stay inside the input as well.
    """
    span = min(window, side)
    if count < span:
        raise RegionError(
            f"image pooling needs a window of {span} features, the input holds {count};"
            " read what Reach.read asks for, or ask for context 'tile'"
        )
    starts = (torch.arange(count) + first - window // 2).clamp(0, side - span) - first
    return starts.clamp(0, count - span)
