"""What the lattice under a whole scene is expected to take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.crf.density import MARGIN, Density
from pipeline.crf.whole_scene import SceneCrf
from pipeline.domain import Grid, Halo, Pass
from workflows.config import RunOptions
from workflows.resolved import SHARE
from workflows.workplace import workplace

ROOM_BYTES = 2 * 2**30
"""The most that a worker keeps of placed tiles where no budget is given, some 25 million pixels of
them: a constant, so that memory does not grow with the scene."""

LEAST_KEPT = 0.1
"""Share of the tiles for which there must be room where no budget is given: so much less time a run
takes for the memory of them, and with less it would be spent for nothing that anyone sees."""

_KEY_BYTES, _SUM_BYTES = 16, 8

_TABLE_BYTES = 288
"""Of a vertex: its key, twice while the list grows, and up to eight slots of the hash table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatticeSize:
    """Expected of the lattice, were all the scene the margin denser than the densest place."""

    vertices: int
    """Summed over tiles: one that several tiles touch counts for each."""

    sent_bytes: int
    """What tiles tell one another, all rounds summed."""

    kept_bytes: int
    """The most that lies in the run directory at a time."""

    tile_bytes: int
    """Of memory, for what the largest tile hears of others."""

    placed_bytes: int
    """Of memory, were all tiles kept as they are placed."""

    room_bytes: int
    """Of memory, what a worker may keep of them between rounds."""

    def with_room(self, options: RunOptions, *, peak_bytes: int, workers: int) -> LatticeSize:
        """The same with what each worker may keep, beside a peak of all that is taken else.

        All that is left of a budget that was asked for; else nothing where it is but for a few
        tiles. Raises ExecutionError.
        """
        asked = options.memory_budget
        left = (asked or int(SHARE * workplace(options).memory_bytes)) - peak_bytes
        room = left // workers if asked else min(left // workers, ROOM_BYTES)
        share = min(self.placed_bytes, 3 * self.placed_bytes // (2 * workers))  # not all alike
        if not asked and workers * room < LEAST_KEPT * self.placed_bytes:
            room = 0
        return replace(self, room_bytes=max(0, min(room, share)))

    @property
    def visits(self) -> str:
        """How tiles are met again, for people."""
        if self.room_bytes:
            return f"kept between visits within {self.room_bytes / 1e9:.1f} GB a worker"
        return "read and placed anew at each visit"


def expected_lattice(density: Density, sweep: Pass, crf: SceneCrf, *, classes: int) -> LatticeSize:
    """Of an image of such density; its kernels are those of the CRF."""
    columns = classes - 1 + (crf.params.compatibility is not None)
    pixels, vertices, sent, heard_bytes = math.prod(sweep.grid.shape), 0, 0, 0
    placed_bytes = pixels * (4 * _width(columns) + 1)  # energies, and which are valid
    for kernel in range(len(crf.params.kernels)):
        share = MARGIN * density.vertices(kernel)
        own = math.ceil(share * pixels)
        heard = [math.ceil(share * others) for others in _heard(sweep.grid, crf, kernel)]
        vertices, sent = vertices + own, sent + sum(heard)
        heard_bytes += max(heard) * _vertex_bytes(crf, kernel, columns=columns)
        corners = _corners(crf, kernel)
        placed_bytes += pixels * 8 * corners  # row and weight
        placed_bytes += (own + sum(heard)) * (8 * corners + 16 * _width(columns) + 4)
    first, each = _KEY_BYTES + _SUM_BYTES, _SUM_BYTES * columns
    return LatticeSize(
        vertices=vertices,
        sent_bytes=sent * (first + crf.params.iterations * each),
        kept_bytes=vertices * (_SUM_BYTES + 2 * each) + sent * (first + 2 * each),
        tile_bytes=heard_bytes,
        placed_bytes=placed_bytes,
        room_bytes=0,
    )


def _heard(grid: Grid, crf: SceneCrf, kernel: int) -> Iterator[float]:
    """For each tile, how many pixels of others touch vertices that it needs, as if spread evenly.

    What a tile touches lies over its core and half a reach around it; what one needs, over its
    core and one and a half.
    """
    reach = crf.reach(kernel)
    touched = tuple(math.ceil(0.5 * width) for width in reach)
    needed = tuple(math.ceil(1.5 * width) + 1 for width in reach)
    for number in range(len(grid)):
        near, pixels = grid.core(number).grow(Halo(needed, needed)), 0.0
        for other in crf.neighbours(kernel, number):
            core = grid.core(other)
            over = core.grow(Halo(touched, touched))
            pixels += core.size * (over & near).size / over.size
        yield pixels


def _vertex_bytes(crf: SceneCrf, kernel: int, *, columns: int) -> int:
    """Key and sums as heard and joined, its place in the tables, two neighbours an axis, rows."""
    heard = 2 * (_KEY_BYTES + _SUM_BYTES + _SUM_BYTES * columns)
    return heard + _TABLE_BYTES + 4 * (2 * _corners(crf, kernel) + 4 * _width(columns))


def _corners(crf: SceneCrf, kernel: int) -> int:
    """Of a simplex: one more than there are features."""
    features = crf.params.kernels[kernel]
    return len(features.position_px) + len(features.channels) + 1


def _width(columns: int) -> int:
    """Values of a row with those that only fill it up, at most."""
    return columns + columns // 2 + 1
