"""What a network's output needs of the scene: a halo, and a context window where it pools."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.domain.region import Halo, Region, Shape
from pipeline.errors import RegionError


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextWindow:
    """The fixed window of an image-pooling layer, shifted (never shortened) to stay in the scene.

    A place near the border uses a window that lies wholly inside, so it may reach almost a whole
    window to one side; that is why this is not a halo.
    """

    size: tuple[int, ...]
    """Side of the window per axis, in pixels: an odd number of strides."""

    inner: Halo
    """Context between an output pixel and the pooled place (head and upsampling), in pixels."""

    outer: Halo
    """Context between a pooled feature and the input (the trunk), in pixels."""

    def reach(self, region: Region, *, stride: int, shape: Shape) -> Region:
        """The part of a scene of ``shape`` that the windows of ``region`` cover."""
        centres = region.grow(self.inner).clip(shape).align(stride)
        start, stop = [], []
        for a, b, size, length in zip(centres.start, centres.stop, self.size, shape, strict=True):
            span = min(size, length)
            half = size // stride // 2 * stride
            start.append(min(max(a - half, 0), length - span))
            stop.append(min(max(b - stride - half, 0), length - span) + span)
        return Region(tuple(start), tuple(stop)).grow(self.outer).clip(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What an output region needs of the input: derived from the network, not guessed."""

    stride: int
    """Output stride: tile origins and the padded scene are multiples of it, in pixels."""

    halo: Halo
    """Receptive field of all local branches around a stride-aligned region, in pixels."""

    window: ContextWindow | None = None
    """The image-pooling window; None for a network without one."""

    pooled: Halo | None = None
    """Halo of the features whose mean over the scene is taken by a pass of its own, in pixels.

    Multiples of the stride; None where no such mean is taken.
    """

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise RegionError(f"an output stride is at least 1 px, got {self.stride}")

    def read(self, region: Region, *, shape: Shape) -> Region:
        """The stride-aligned input that ``region`` needs, cut at a scene of padded ``shape``."""
        local = region.grow(self.halo).clip(shape).align(self.stride)
        if self.window is None:
            return local
        return local | self.window.reach(region, stride=self.stride, shape=shape).align(self.stride)

    @property
    def halo_with_window(self) -> Halo:
        """Halo of a place far from the border, half the window included, in pixels."""
        if self.window is None:
            return self.halo
        half = tuple(s // self.stride // 2 * self.stride for s in self.window.size)
        pooled = self.window.inner.round_up(self.stride) + Halo(half, half) + self.window.outer
        return self.halo | pooled.round_up(self.stride)
