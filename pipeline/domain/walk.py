"""In which order the tiles of a pass are best run: so that little of the image is read twice."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.domain.plan import Pass, Tile
from pipeline.domain.region import Halo, Region, Shape

BLOCK = 512
"""Side of the blocks that most rasters are stored in, in pixels: what is decoded at once."""

SIDE_SHARE = 4
"""A band is this many times as wide as what is read on both its sides."""


@dataclass(frozen=True, slots=True)
class Walk:
    """Bands of tiles along the last axis, each walked row by row.

    What neighbours in a band share is read once by a reader that remembers one row of the band:
    memory that does not grow with the scene, as a whole row of the scene would. The sides of a
    band are read by both its neighbours; they are a quarter of it.
    """

    sweep: Pass

    @property
    def width(self) -> int:
        """Tiles side by side in a band; at least 1."""
        tile = self.sweep.grid.tile[-1]
        wanted = -(-2 * SIDE_SHARE * self._margin[-1] // tile)
        return min(max(wanted, 1), self.sweep.grid.counts[-1])

    @property
    def remembered_pixels(self) -> int:
        """What a reader that forgets the longest unused must hold, so that rows share their blocks.

        One row of a band with all that its tiles read. A core less is enough by count, but not for
        GDAL's cache: 1.5 times the scene was decoded then, 1.2 times with all of it (measured).
        A tile alone shares nothing.
        """
        if len(self.sweep) == 1:
            return 0
        tile, shape = self.sweep.grid.tile, self.sweep.grid.shape
        sides = (*tile[:-1], self.width * tile[-1])
        row = tuple(
            min(side + 2 * margin, length)
            for side, margin, length in zip(sides, self._margin, shape, strict=True)
        )
        return Region.whole(row).size

    @property
    def read_amplification(self) -> float:
        """Pixels decoded over those of the scene, by a reader that remembers so much.

        Over those of the cores, and at most, where not all tiles run.
        """
        if self.sweep.chosen is not None:
            block = Region.whole((BLOCK,) * len(self._margin))
            return self._blocks_read * block.size / self.sweep.covered_pixels
        tile, length, margin = self.sweep.grid.tile[-1], self.sweep.grid.shape[-1], self._margin[-1]
        band = self.width * tile
        ends = [(left, min(left + band, length)) for left in range(0, length, band)]
        decoded = sum(min(b + margin, length) - max(a - margin, 0) for a, b in ends)
        return decoded / length

    def stretches(self) -> Iterator[list[Tile]]:
        """The tiles of one band after another: each tile of the pass once."""
        return ([self.sweep.tile(number) for number in band] for band in self._bands())

    def _bands(self) -> Iterator[list[int]]:
        """Numbers of the tiles of one band after another, those that run."""
        *others, last = self.sweep.grid.counts
        running = frozenset(self.sweep.numbers)
        for left in range(0, last, self.width):
            band = range(left, min(left + self.width, last))
            rows = range(Region.whole(tuple(others)).size)
            numbers = (row * last + column for row in rows for column in band)
            yield [number for number in numbers if number in running]

    @property
    def _blocks_read(self) -> int:
        """Stored blocks that tiles read, each once a band."""
        around, shape, count = Halo(self._margin, self._margin), self.sweep.grid.shape, 0
        for band in self._bands():
            found: set[tuple[int, ...]] = set()
            for number in band:
                read = self.sweep.grid.core(number).grow(around).clip(shape)
                ends = zip(read.start, read.stop, strict=True)
                sides = (range(a // BLOCK, -(-b // BLOCK)) for a, b in ends)
                found.update(itertools.product(*sides))
            count += len(found)
        return count

    @property
    def _margin(self) -> Shape:
        """What is read beyond a core, per axis, in pixels of whole blocks."""
        halo = self.sweep.reach.halo_with_window + self.sweep.crf_halo
        sides = zip(halo.before, halo.after, strict=True)
        return tuple(-(-max(side) // BLOCK) * BLOCK for side in sides)
