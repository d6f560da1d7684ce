"""How a layer's output lies over its input: what slides, and what resizes.

Regions are in elements of their own map; what is read may reach outside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from pipeline.domain import Region, Shape
from pipeline.models.resize import Resize


class Geometry(Protocol):
    """How a layer's output lies over its input, per axis."""

    @property
    def pointwise(self) -> bool:
        """Whether a place of the output needs the same place of the input, and no other."""

    def shape(self, shape: Shape) -> Shape:
        """Shape of the output for an input of ``shape``."""

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

    def reads(self, region: Region) -> Region:
        """As ``Geometry.reads``."""
        rows = list(zip(self.stride, self.padding, self.dilation, self.kernel, strict=True))
        return Region(
            tuple(a * s - p for a, (s, p, _, _) in zip(region.start, rows, strict=True)),
            tuple(
                (b - 1) * s - p + d * (k - 1) + 1
                for b, (s, p, d, k) in zip(region.stop, rows, strict=True)
            ),
        )

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
        return Resize(self.up, self.down, align_corners=self.align_corners)

    def shape(self, shape: Shape) -> Shape:
        """As ``Geometry.shape``."""
        end = int(self.align_corners)
        rows = zip(shape, self.up, self.down, strict=True)
        return tuple((n - end) * u // d + end for n, u, d in rows)

    def reads(self, region: Region) -> Region:
        """As ``Geometry.reads``: the two neighbours of each place, as torch reads them.

        Cut where elements of input and output coincide, so that it can be resized by itself.
        """
        end = int(self.align_corners)
        rows = list(zip(region.start, region.stop, self.up, self.down, strict=True))
        first = [self._below(a, u, d) for a, _, u, d in rows]
        last = [self._below(b - 1, u, d) + 1 for _, b, u, d in rows]
        return Region(
            tuple(a // d * d for a, d in zip(first, self.down, strict=True)),
            tuple(-(-(b + 1 - end) // d) * d + end for b, d in zip(last, self.down, strict=True)),
        )

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


def per_axis(value: Any, ndim: int) -> tuple[int, ...]:
    """One number for all axes, or one for each."""
    return (value,) * ndim if isinstance(value, int) else tuple(value)
