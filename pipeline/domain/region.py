"""Where: half-open boxes in pixels or voxels, and the context that a box needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import RegionError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Halo:
    """Pixels of context that a core needs, per axis and side.

    >>> Halo.uniform(3, ndim=2) + Halo(before=(1, 0), after=(0, 2))
    Halo(before=(4, 3), after=(3, 5))
    """

    before: tuple[int, ...]
    """Pixels before the core's first, per axis."""

    after: tuple[int, ...]
    """Pixels after the core's last, per axis."""

    def __post_init__(self) -> None:
        if len(self.before) != len(self.after):
            raise RegionError(f"a halo needs one pair per axis, got {self.before} and {self.after}")
        if min(self.before + self.after, default=0) < 0:
            raise RegionError(f"a halo cannot be negative, got {self.before} and {self.after}")

    @classmethod
    def uniform(cls, width: int, *, ndim: int) -> Halo:
        """The same width on every side of every axis."""
        return cls((width,) * ndim, (width,) * ndim)

    def __add__(self, other: Halo) -> Halo:
        return Halo(
            tuple(a + b for a, b in zip(self.before, other.before, strict=True)),
            tuple(a + b for a, b in zip(self.after, other.after, strict=True)),
        )

    def __or__(self, other: Halo) -> Halo:
        """The smallest halo that contains both."""
        return Halo(
            tuple(max(a, b) for a, b in zip(self.before, other.before, strict=True)),
            tuple(max(a, b) for a, b in zip(self.after, other.after, strict=True)),
        )

    def round_up(self, stride: int) -> Halo:
        """Every side rounded up to a multiple of ``stride``."""
        return Halo(
            tuple(-(-a // stride) * stride for a in self.before),
            tuple(-(-a // stride) * stride for a in self.after),
        )

    @property
    def largest(self) -> int:
        """The widest side, in pixels."""
        return max(self.before + self.after, default=0)


@dataclass(frozen=True, slots=True)
class Region:
    """A half-open box ``[start, stop)`` in pixels or voxels, one pair per axis.

    >>> Region(start=(512, 0), stop=(1024, 512)).grow(Halo.uniform(64, ndim=2)).clip((4096, 4096))
    Region(start=(448, 0), stop=(1088, 576))
    """

    start: tuple[int, ...]
    """First voxel inside, per axis (y, x) or (z, y, x); may be negative."""

    stop: tuple[int, ...]
    """First voxel outside, per axis."""

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop) or not self.start:
            raise RegionError(
                f"a region needs one (start, stop) per axis, got {self.start}, {self.stop}"
            )
        if any(a > b for a, b in zip(self.start, self.stop, strict=True)):
            raise RegionError(
                f"a region cannot stop before it starts, got {self.start} to {self.stop}"
            )

    @classmethod
    def whole(cls, shape: Shape) -> Region:
        """All of an image of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.start)

    @property
    def shape(self) -> Shape:
        """Length per axis, in voxels."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of voxels inside."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    def grow(self, halo: Halo) -> Region:
        """The box with the halo around it; may reach outside the image."""
        return Region(
            tuple(a - h for a, h in zip(self.start, halo.before, strict=True)),
            tuple(b + h for b, h in zip(self.stop, halo.after, strict=True)),
        )

    def clip(self, shape: Shape) -> Region:
        """The part inside an image of this shape."""
        return self & Region.whole(shape)

    def move(self, by: tuple[int, ...]) -> Region:
        """The box of the same shape that starts ``by`` voxels further, per axis."""
        return Region(
            tuple(a + n for a, n in zip(self.start, by, strict=True)),
            tuple(b + n for b, n in zip(self.stop, by, strict=True)),
        )

    def mirrored(self, axes: Sequence[int], *, shape: Shape) -> Region:
        """The box in the mirror image, along ``axes``, of an image of this shape.

        >>> Region((0, 2), (4, 3)).mirrored((1,), shape=(8, 8))
        Region(start=(0, 5), stop=(4, 6))
        """
        ends = [
            (n - b, n - a) if axis in axes else (a, b)
            for axis, (a, b, n) in enumerate(zip(self.start, self.stop, shape, strict=True))
        ]
        start, stop = zip(*ends, strict=True)
        return Region(start, stop)

    def align(self, stride: int | Shape) -> Region:
        """The smallest box with sides at multiples of ``stride`` that contains this one."""
        strides = (stride,) * self.ndim if isinstance(stride, int) else stride
        return Region(
            tuple(a // s * s for a, s in zip(self.start, strides, strict=True)),
            tuple(-(-b // s) * s for b, s in zip(self.stop, strides, strict=True)),
        )

    def __and__(self, other: Region) -> Region:
        """The common part; empty (zero-length, inside ``other``) where there is none."""
        start = tuple(
            min(max(a, c), d) for a, c, d in zip(self.start, other.start, other.stop, strict=True)
        )
        stop = tuple(
            max(min(b, d), s) for b, d, s in zip(self.stop, other.stop, start, strict=True)
        )
        return Region(start, stop)

    def __or__(self, other: Region) -> Region:
        """The smallest box that contains both."""
        return Region(
            tuple(min(a, b) for a, b in zip(self.start, other.start, strict=True)),
            tuple(max(a, b) for a, b in zip(self.stop, other.stop, strict=True)),
        )

    def __contains__(self, other: Region) -> bool:
        return all(
            a <= c and d <= b
            for a, b, c, d in zip(self.start, self.stop, other.start, other.stop, strict=True)
        )

    def slices(self, *, within: Region) -> tuple[slice, ...]:
        """Index of this box in an array that holds ``within``.

        >>> Region((4, 6), (5, 8)).slices(within=Region((4, 4), (8, 8)))
        (slice(0, 1, None), slice(2, 4, None))
        """
        if self not in within:
            raise RegionError(f"{self} is not inside {within}")
        return tuple(
            slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, within.start, strict=True)
        )

    def blocks(self, shape: Shape) -> Iterator[Region]:
        """This box cut into boxes of at most ``shape``, in row-major order."""
        yield from _blocks(self, tuple(shape), axis=0)


def _blocks(region: Region, shape: Shape, *, axis: int) -> Iterator[Region]:
    if axis == region.ndim:
        yield region
        return
    for a in range(region.start[axis], region.stop[axis], shape[axis]):
        b = min(a + shape[axis], region.stop[axis])
        part = Region(
            (*region.start[:axis], a, *region.start[axis + 1 :]),
            (*region.stop[:axis], b, *region.stop[axis + 1 :]),
        )
        yield from _blocks(part, shape, axis=axis + 1)
