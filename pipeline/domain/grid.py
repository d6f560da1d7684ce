"""How an image is cut: disjoint cores that cover it, anchored at the scene's (0, 0)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.domain.region import Region, Shape
from pipeline.errors import RegionError


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Cores of one size over a scene; the last ones along an axis may be shorter.

    >>> grid = Grid(shape=(5, 9), tile=(4, 4), stride=4)
    >>> grid.padded_shape, grid.counts, len(grid)
    ((8, 12), (2, 3), 6)
    >>> grid.core(5)
    Region(start=(4, 8), stop=(5, 9))
    """

    shape: Shape
    """The scene, in pixels."""

    tile: Shape
    """The core, in pixels; multiples of the stride."""

    stride: int
    """Output stride of the network, in pixels."""

    endpoint: int = 0
    """Pixels of a valid side beyond a multiple of the stride: 1 where corners are aligned."""

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.tile) or min(self.shape, default=0) < 1:
            raise RegionError(f"cannot cut a scene of {self.shape} px into tiles of {self.tile} px")
        if self.stride < 1:
            raise RegionError(f"an output stride is at least 1 px, got {self.stride}")
        if min(self.tile) < 1 or any(t % self.stride for t in self.tile):
            raise RegionError(
                f"tile {self.tile} px must be a multiple of the output stride {self.stride} px"
            )

    @property
    def padded_shape(self) -> Shape:
        """The scene grown at the bottom and right to a valid size."""
        end = self.endpoint
        return tuple(-(-(n - end) // self.stride) * self.stride + end for n in self.shape)

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of cores per axis."""
        return tuple(-(-n // t) for n, t in zip(self.shape, self.tile, strict=True))

    def __len__(self) -> int:
        return Region.whole(self.counts).size

    def core(self, number: int) -> Region:
        """Core ``number`` in row-major order."""
        if not 0 <= number < len(self):
            raise RegionError(f"core {number} asked of a grid with {len(self)} cores")
        start: list[int] = []
        for count, side in zip(reversed(self.counts), reversed(self.tile), strict=True):
            number, index = divmod(number, count)
            start.insert(0, index * side)
        stop = tuple(
            min(a + side, n) for a, side, n in zip(start, self.tile, self.shape, strict=True)
        )
        return Region(tuple(start), stop)

    def cores(self) -> Iterator[Region]:
        """All cores in row-major order."""
        return (self.core(number) for number in range(len(self)))

    def parts(self, region: Region) -> Iterator[Region]:
        """A region of the scene, cut where cores meet.

        >>> grid = Grid(shape=(5, 9), tile=(4, 4), stride=4)
        >>> [part.start for part in grid.parts(Region((2, 6), (4, 9)))]
        [(2, 6), (2, 8)]
        """
        for index in self._indices(region):
            core = Region(
                tuple(n * t for n, t in zip(index.start, self.tile, strict=True)),
                tuple(n * t for n, t in zip(index.stop, self.tile, strict=True)),
            )
            yield core & region

    def meeting(self, region: Region) -> Iterator[int]:
        """Numbers of the cores that a region of the scene meets, ascending.

        >>> list(Grid(shape=(5, 9), tile=(4, 4), stride=4).meeting(Region((2, 6), (4, 9))))
        [1, 2]
        """
        for index in self._indices(region):
            number = 0
            for count, at in zip(self.counts, index.start, strict=True):
                number = number * count + at
            yield number

    def _indices(self, region: Region) -> Iterator[Region]:
        """Of the cores that a region meets, a box of one each; row-major."""
        first = tuple(a // t for a, t in zip(region.start, self.tile, strict=True))
        stop = tuple(-(-b // t) for b, t in zip(region.stop, self.tile, strict=True))
        return Region(first, stop).blocks((1,) * region.ndim)
