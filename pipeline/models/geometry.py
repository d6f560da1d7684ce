"""How a layer's output lies over its input: what slides, and what resizes.

Regions are in elements of their own map; what is read may reach outside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.domain import Region, Shape

if TYPE_CHECKING:
    from torch import nn

    from pipeline.models.resize import Resize


class Geometry(Protocol):
    """How a layer's output lies over its input, per axis."""

    @property
    def pointwise(self) -> bool:
        """Whether a place of the output needs the same place of the input, and no other."""

    def shape(self, shape: Shape) -> Shape:
        """Shape of the output for an input of ``shape``."""

    def span(self, axis: int, first: int, stop: int) -> tuple[int, int]:
        """What ``[first, stop)`` of the output needs of the input along ``axis``; may reach out."""

    def reads(self, region: Region) -> Region:
        """What ``region`` of the output needs of the input; may reach outside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slide:
    """How a convolution or pooling layer slides over its input, per axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, layer: nn.Module, ndim: int) -> Slide:
        """Of a convolution or pooling layer; an average pool has no dilation."""
        names = {"kernel": "kernel_size"} | {n: n for n in ("stride", "padding", "dilation")}
        return cls(**{key: per_axis(getattr(layer, name, 1), ndim) for key, name in names.items()})

    @property
    def pointwise(self) -> bool:
        """As ``Geometry.pointwise``."""
        return set(self.kernel + self.stride) == {1} and set(self.padding) == {0}

    def shape(self, shape: Shape) -> Shape:
        """As ``Geometry.shape``."""
        rows = zip(shape, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in rows)

    def span(self, axis: int, first: int, stop: int) -> tuple[int, int]:
        """As ``Geometry.span``."""
        stride, padding = self.stride[axis], self.padding[axis]
        wide = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return first * stride - padding, (stop - 1) * stride - padding + wide

    def reads(self, region: Region) -> Region:
        """As ``Geometry.reads``."""
        return _reads(self, region)

    def fits(self, *, endpoint: int) -> bool:
        """Whether rounding up (``ceil_mode``) gives the shape that rounding down does.

        That is so for all sides of k x stride + ``endpoint`` or for none.
        """
        rows = zip(self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return all((endpoint + 2 * p - d * (k - 1) - 1) % s == 0 for k, s, p, d in rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Linear interpolation to ``up / down`` of the size, per axis (``Resize``)."""

    up: tuple[int, ...]
    down: tuple[int, ...]
    align_corners: bool

    @classmethod
    def of(cls, layer: Resize) -> Scale:
        """Of a layer."""
        return cls(up=layer.up, down=layer.down, align_corners=layer.align_corners)

    @property
    def pointwise(self) -> bool:
        """As ``Geometry.pointwise``."""
        return self.up == self.down

    @property
    def layer(self) -> Resize:
        """The layer again."""
        from pipeline.models.resize import Resize

        return Resize(self.up, self.down, align_corners=self.align_corners)

    def shape(self, shape: Shape) -> Shape:
        """As ``Geometry.shape``."""
        end = int(self.align_corners)
        rows = zip(shape, self.up, self.down, strict=True)
        return tuple((n - end) * u // d + end for n, u, d in rows)

    def span(self, axis: int, first: int, stop: int) -> tuple[int, int]:
        """As ``Geometry.span``: the two neighbours of each place, as torch reads them.

        Cut where elements of input and output coincide, so that it can be resized by itself.
        """
        end, up, down = int(self.align_corners), self.up[axis], self.down[axis]
        below, last = self._below(first, up, down), self._below(stop - 1, up, down) + 1
        return below // down * down, -(-(last + 1 - end) // down) * down + end

    def reads(self, region: Region) -> Region:
        """As ``Geometry.reads``."""
        return _reads(self, region)

    def gives(self, region: Region) -> Region:
        """The places of the output that resizing ``region`` of the input by itself gives."""
        end = int(self.align_corners)
        rows = list(zip(region.start, region.stop, self.up, self.down, strict=True))
        return Region(
            tuple(a * u // d for a, _, u, d in rows),
            tuple((b - end) * u // d + end for _, b, u, d in rows),
        )

    def _below(self, place: int, up: int, down: int) -> int:
        """The element at or before ``place`` of the output."""
        if self.align_corners:
            return place * down // up
        return ((2 * place + 1) * down - up) // (2 * up)


def _reads(over: Geometry, region: Region) -> Region:
    ends = enumerate(zip(region.start, region.stop, strict=True))
    start, stop = zip(*(over.span(axis, first, stop) for axis, (first, stop) in ends), strict=True)
    return Region(start, stop)


def per_axis(value: Any, ndim: int) -> tuple[int, ...]:
    """One number for all axes, or one for each."""
    return (value,) * ndim if isinstance(value, int) else tuple(value)
