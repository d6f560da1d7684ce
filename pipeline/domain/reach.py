"""What a network's output needs of the scene: a halo, and a context window where it pools."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.domain.region import Halo, Region, Shape
from pipeline.errors import RegionError


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextWindow:
    """The fixed window of an image-pooling layer, shifted (never shortened) to stay in the scene.

    A place near the border uses a window that lies wholly inside, so it may reach almost a whole
    window to one side; that is why this is not a halo.
    """

    size: tuple[int, ...]
    """Side of the window per axis, in pixels: an odd number of steps."""

    steps: tuple[int, ...]
    """Pixels between neighbouring features, per axis."""

    inner: Halo
    """Context between an output pixel and the pooled place (head and upsampling), in pixels."""

    outer: Halo
    """Context between a pooled feature and the input (the trunk), in pixels."""

    def reach(self, region: Region, *, shape: Shape) -> Region:
        """The part of a scene of ``shape`` that the windows of ``region`` cover."""
        centres = region.grow(self.inner).clip(shape)
        start, stop = [], []
        rows = zip(centres.start, centres.stop, self.size, self.steps, shape, strict=True)
        for a, b, size, step, side in rows:
            length = -(-side // step) * step  # all features, a step each
            span = min(size, length)
            half = size // step // 2 * step
            first, last = a // step * step, -(-b // step) * step - step
            start.append(min(max(first - half, 0), length - span))
            stop.append(min(max(last - half, 0), length - span) + span)
        return Region(tuple(start), tuple(stop)).grow(self.outer).clip(shape)

    def __or__(self, other: ContextWindow) -> ContextWindow:
        """One that holds both, which have the same steps."""
        assert self.steps == other.steps
        return replace(
            self,
            size=tuple(max(a, b) for a, b in zip(self.size, other.size, strict=True)),
            inner=self.inner | other.inner,
            outer=self.outer | other.outer,
        )

    @property
    def half(self) -> tuple[int, ...]:
        """Half of the window per axis, in pixels, its middle left out."""
        return tuple(side // s // 2 * s for side, s in zip(self.size, self.steps, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What an output region needs of the input: derived from the network, not guessed."""

    stride: int
    """Output stride: tile origins are multiples of it, in pixels."""

    endpoint: int = 0
    """Pixels of a valid side beyond a multiple of the stride: 1 where corners are aligned."""

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

    def __or__(self, other: Reach) -> Reach:
        """What holds both, which have the same stride and steps; no mean over the scene is left."""
        window = self.window
        if window is not None and other.window is not None:
            window = window | other.window
        return Reach(
            stride=self.stride,
            endpoint=self.endpoint,
            halo=self.halo | other.halo,
            window=window or other.window,
        )

    def read(self, region: Region, *, shape: Shape) -> Region:
        """The input of valid sides that ``region`` needs, cut at a scene of padded ``shape``."""
        local = region.grow(self.halo).clip(shape)
        if self.window is not None:
            local |= self.window.reach(region, shape=shape)
        stride, end = self.stride, self.endpoint
        return Region(
            tuple(a // stride * stride for a in local.start),
            tuple(-(-(b - end) // stride) * stride + end for b in local.stop),
        )

    def both_ways(self) -> Reach:
        """What is needed of the scene and of its mirror image, along whichever axes.

        Where corners are aligned, a region that ends on the stride starts beside it when mirrored:
        it needs a stride more.
        """
        beyond = Halo.uniform(self.endpoint * self.stride, ndim=len(self.halo.before))

        def joined(halo: Halo, beyond: Halo) -> Halo:
            return halo | (Halo(halo.after, halo.before) + beyond)

        window = self.window and replace(
            self.window,
            inner=joined(self.window.inner, beyond),
            outer=joined(self.window.outer, beyond),
        )
        return replace(self, halo=joined(self.halo, beyond), window=window)

    @property
    def halo_with_window(self) -> Halo:
        """Halo of a place far from the border, half the window included, in pixels."""
        if self.window is None:
            return self.halo
        half = Halo(self.window.half, self.window.half)
        pooled = self.window.inner.round_up(self.stride) + half + self.window.outer
        return self.halo | pooled.round_up(self.stride)
