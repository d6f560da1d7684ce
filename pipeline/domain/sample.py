"""Small places of a scene that are computed twice, so that the seams are measured.

They follow from the grid, a seed, and where the image has pixels: no clock, no number of workers
and no other run decides them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.domain.grid import Grid
from pipeline.domain.plan import Pass, Tile, TileKey
from pipeline.domain.reach import Reach
from pipeline.domain.region import Halo, Region

SIDE = {2: 64, 3: 24}
"""Longest side of a sample, in pixels, by number of axes."""

MOST_PAIRS = 8

TRIES = 256
"""Places that are thought of for a sample where not all of the scene gets labels."""

LOOKS = 256
"""Places of which pixels are read, for all samples together."""

SHARE = 0.05
"""What the samples may read, over the scene; the first pair is taken in any case."""

MARGIN = 2
"""Strides of context beyond what the network's layers reach: a halo derived too short is seen."""

CRF_MARGIN = 2
"""CRF halos around a sample: a tile has one."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One place, and why it was chosen."""

    kind: Literal["seam", "interior"]
    """``seam``: astride a border between tiles. ``interior``: in the middle of a tile."""

    region: Region


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePass:
    """The pass that computes the samples of one case again, each on its own, with more context."""

    case: str
    grid: Grid

    reach: Reach
    """Of the network's own layers, whatever halo the tiles were given."""

    crf_halo: Halo
    """Of a tile, in pixels; zero without CRF."""

    samples: tuple[Sample, ...]
    """Pairs of a seam and an interior one of the same size; none where no two tiles meet."""

    @classmethod
    def at(cls, sweep: Pass, *, reach: Reach, samples: tuple[Sample, ...]) -> SamplePass:
        """These samples, over the tiles of ``sweep``."""
        return cls(
            case=sweep.case,
            grid=sweep.grid,
            reach=reach,
            crf_halo=sweep.crf_halo,
            samples=samples,
        )

    @classmethod
    def of(
        cls,
        sweep: Pass,
        *,
        reach: Reach,
        seed: str,
        wanted: Callable[[Region], bool] | None = None,
    ) -> SamplePass:
        """Pairs over the tiles of ``sweep``: one, and more while they read little.

        Args:
            sweep: the pass that writes the mask.
            reach: of the network's layers.
            seed: where the pairs lie, apart from the first.
            wanted: whether a place holds a pixel that gets a label; None where all places do. It
                is asked ``LOOKS`` times at most.
        """
        budget, chosen = SHARE * sweep.covered_pixels, cls.at(sweep, reach=reach, samples=())
        wanted = None if wanted is None else _Looks(wanted)
        for number in range(MOST_PAIRS if len(sweep) > 1 else 0):
            pair = _pair(sweep, number, seed=seed, wanted=wanted)
            if pair is None and not chosen.samples and number >= len(sweep.grid.shape):
                break  # no border along any axis has pixels on both sides
            if pair is None:
                continue
            more = replace(chosen, samples=(*chosen.samples, *pair))
            if chosen.samples and (more.read_voxels > budget or pair[0] in chosen.samples):
                break
            chosen = more
        return chosen

    @property
    def name(self) -> str:
        """The pass's name in the ledger."""
        return "certify"

    @property
    def needs(self) -> str:
        """As of the tiles: the scene's mean is the one that they pooled by."""
        return "context" if self.reach.pooled is not None and len(self.grid) > 1 else ""

    @property
    def bears_gaps(self) -> bool:
        """A mean that lacks a tile is another one."""
        return False

    def __len__(self) -> int:
        return len(self.samples)

    def tile(self, number: int) -> Tile:
        """Sample ``number``: what is compared, what the CRF sees, and what is read."""
        region, padded = self.samples[number].region, self.grid.padded_shape
        margin = Halo.uniform(MARGIN * self.grid.stride, ndim=region.ndim)
        scored = region
        for _ in range(CRF_MARGIN):
            scored = scored.grow(self.crf_halo)
        scored = scored.align(self.grid.stride).clip(padded)
        read = self.reach.read(scored.grow(margin).clip(padded), shape=padded)
        key = TileKey(self.case, self.name, number)
        return Tile(key=key, core=region, scored=scored, read=read)

    def tiles(self) -> Iterator[Tile]:
        """All samples, in order."""
        return (self.tile(number) for number in range(len(self)))

    @property
    def read_voxels(self) -> int:
        """Voxels that the network computes, all samples summed."""
        return sum(tile.read.size for tile in self.tiles())


@dataclass(slots=True)
class _Looks:
    """A question that may be asked so many times, and is then answered no."""

    wanted: Callable[[Region], bool]
    left: int = LOOKS

    def __call__(self, region: Region) -> bool:
        """The answer."""
        self.left -= 1
        return self.left >= 0 and self.wanted(region)


def _pair(
    sweep: Pass, number: int, *, seed: str, wanted: Callable[[Region], bool] | None
) -> tuple[Sample, Sample] | None:
    """Pair ``number``: across all axes, then across each alone, and so on; the first is central.

    At another place where tiles do not run there or nothing is wanted; None if none is found.
    """
    if sweep.chosen is None:
        pair = _planned_pair(sweep.grid, number, seed=seed)
        if wanted is None or all(_held(sweep.grid, sample, wanted) for sample in pair):
            return pair
    return None if wanted is None else _pair_among(sweep, number, seed=seed, wanted=wanted)


def _held(grid: Grid, sample: Sample, wanted: Callable[[Region], bool]) -> bool:
    """Whether each tile that a sample meets has pixels there that are wanted."""
    return all(wanted(part) for part in grid.parts(sample.region))


def _planned_pair(grid: Grid, number: int, *, seed: str) -> tuple[Sample, Sample]:
    """Pair ``number`` where all places are alike."""
    at = [_fraction(seed, number, axis) for axis in range(len(grid.shape))]
    # The last tile may be short.
    home = [int(place * max(count - 1, 1)) for place, count in zip(at, grid.counts, strict=True)]
    return _pair_at(grid, home, at, along=Region.whole(grid.shape), crossed=_crossed(grid, number))


def _pair_among(
    sweep: Pass, number: int, *, seed: str, wanted: Callable[[Region], bool]
) -> tuple[Sample, Sample] | None:
    """Pair ``number`` in tiles that run, each with pixels that are wanted; None if none is found.

    Tiles that run may lie apart, and what is wanted of them be small: places are tried.
    """
    grid, running, crossed = sweep.grid, frozenset(sweep.numbers), _crossed(sweep.grid, number)
    found: dict[str, Sample] = {}
    for attempt in range(1, TRIES + 1):
        seed_here = f"{seed} {number}"
        *at, which = (_fraction(seed_here, attempt, axis) for axis in range(len(grid.shape) + 1))
        core = grid.core(sweep.numbers[int(which * len(sweep))])
        home = [a // side for a, side in zip(core.start, grid.tile, strict=True)]
        for sample in _pair_at(grid, home, at, along=core, crossed=crossed):
            met = {*grid.meeting(sample.region)}
            full = len(met) == (2 ** len(crossed) if sample.kind == "seam" else 1)
            here = sample.kind not in found and full and met <= running
            # Past the last tile there is no place.
            if here and sample.region.size and _held(grid, sample, wanted):
                found[sample.kind] = sample
        if len(found) == 2:
            return found["seam"], found["interior"]
    return None


def _crossed(grid: Grid, number: int) -> set[int]:
    """The axes whose borders pair ``number`` lies astride: all that are cut, then each alone."""
    cut = [axis for axis, count in enumerate(grid.counts) if count > 1]
    kinds = [set(cut), *({axis} for axis in cut if len(cut) > 1)]
    return kinds[number % len(kinds)]


def _pair_at(
    grid: Grid, home: Sequence[int], at: Sequence[float], *, along: Region, crossed: set[int]
) -> tuple[Sample, Sample]:
    """The pair astride the ends of the tile of index ``home``, and within it.

    ``at``: where, from 0 to 1, in the tile, and in ``along`` on the axes that are not crossed.
    """
    seam, interior = [], []
    for axis, (index, place) in enumerate(zip(home, at, strict=True)):
        length, tile = grid.shape[axis], grid.tile[axis]
        side = min(SIDE[len(grid.shape)], max(tile // 2, 1), length)
        span = min(tile, length)
        inside = index * tile + span // 4 + int(place * max(span // 2 - side, 0))
        first, last = along.start[axis], along.stop[axis] - side
        free = first + int(place * max(last - first + 1, 0))
        start = (index + 1) * tile - side // 2 if axis in crossed else free
        seam.append((start, start + side))
        interior.append((inside, inside + side))
    return Sample("seam", _box(seam, grid)), Sample("interior", _box(interior, grid))


def _box(edges: Sequence[tuple[int, int]], grid: Grid) -> Region:
    return Region(*(tuple(ends) for ends in zip(*edges, strict=True))).clip(grid.shape)


def _fraction(seed: str, number: int, axis: int) -> float:
    """A number from 0 to 1, always the same; the middle for the first, where scenes have pixels."""
    if number == 0:
        return 0.5
    digest = hashlib.sha256(" ".join(map(str, (seed, number, axis))).encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32
