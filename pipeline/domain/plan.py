"""All tiles of a run, before anything runs: inert values that can be printed and compared."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from pipeline.domain.grid import Grid
from pipeline.domain.reach import Reach
from pipeline.domain.region import Halo, Region
from pipeline.errors import RegionError


class TileKey(NamedTuple):
    """The ledger's key: which tile of which pass over which case."""

    case: str
    stage: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One unit of work, write and retry; ``core`` within ``scored`` within ``read``."""

    key: TileKey

    core: Region
    """What this tile alone writes; inside the scene."""

    scored: Region
    """What the network predicts: the core and the CRF's own halo, stride-aligned."""

    read: Region
    """What is read: ``scored`` and the network's reach, cut at the padded scene."""

    def __post_init__(self) -> None:
        if self.core not in self.scored or self.scored not in self.read:
            raise RegionError(
                f"tile {self.key.number}: core {self.core} must lie in scored {self.scored},"
                f" and that in read {self.read}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One sweep over the tiles of one case (statistics, context, segment, CRF)."""

    case: str
    """Identifier of the scene or scan."""

    name: str
    """Name of the sweep: ``segment`` is the one that writes the mask."""

    grid: Grid
    reach: Reach

    crf_halo: Halo
    """Context of the CRF around the core, on top of the network's, in pixels; zero without CRF."""

    after: str = ""
    """The pass that must have ended before, by name; empty where the network's reach says it."""

    bears_gaps: bool = False
    """Whether a tile that failed there is all that fails here, or every tile does."""

    chosen: tuple[int, ...] | None = None
    """Numbers of the tiles that run, ascending, at least one; None where all of them do."""

    def __post_init__(self) -> None:
        if self.chosen == ():
            raise RegionError(f"no tile of pass {self.name} would run")

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def numbers(self) -> Sequence[int]:
        """Of the tiles that run, ascending."""
        return range(len(self.grid)) if self.chosen is None else self.chosen

    def tile(self, number: int) -> Tile:
        """Tile ``number`` in row-major order."""
        core, padded = self.grid.core(number), self.grid.padded_shape
        scored = core.grow(self.crf_halo).align(self.grid.stride).clip(padded)
        read = self.reach.read(scored, shape=padded)
        key = TileKey(self.case, self.name, number)
        return Tile(key=key, core=core, scored=scored, read=read)

    def tiles(self) -> Iterator[Tile]:
        """All tiles that run, row-major."""
        return (self.tile(number) for number in self.numbers)

    @property
    def needs(self) -> str:
        """The pass whose results this one reads, by name; empty where there is none."""
        if self.after:
            return self.after
        return "context" if self.reach.pooled is not None and len(self.grid) > 1 else ""

    def with_context(self) -> tuple[Pass, ...]:
        """This pass, after the one that finds the scene's mean where no tile sees all of it.

        The mean is the whole scene's, whichever tiles run after it.
        """
        pooled = self.reach.pooled
        if pooled is None or not self.needs:
            return (self,)
        reach = Reach(stride=self.reach.stride, endpoint=self.reach.endpoint, halo=pooled)
        none = Halo.uniform(0, ndim=len(self.grid.shape))
        return replace(self, name="context", reach=reach, crf_halo=none, chosen=None), self

    def kinds(self) -> Iterator[tuple[Tile, int]]:
        """One tile of each kind, and how many are of it: what holds for one holds for all.

        Tiles of a kind have cores of one shape, and are equally far from each border of the scene,
        or so far that nothing they need is cut off or shifted there.
        """
        if self.chosen is not None:
            yield from self._chosen_kinds(self.chosen)
            return
        axes = [self._axis_kinds(axis) for axis in range(len(self.grid.shape))]
        for places in itertools.product(*axes):
            number = 0
            for count, (index, _) in zip(self.grid.counts, places, strict=True):
                number = number * count + index
            yield self.tile(number), math.prod(alike for _, alike in places)

    def _axis_kinds(self, axis: int) -> list[tuple[int, int]]:
        """Index of the first core of each kind along an axis, and how many are of it."""
        side = self.grid.tile[axis]
        found: dict[tuple[int, int], tuple[int, int]] = {}
        for index in range(self.grid.counts[axis]):
            kind = self._axis_kind(axis, index * side)
            first, alike = found.get(kind, (index, 0))
            found[kind] = first, alike + 1
        return list(found.values())

    def _chosen_kinds(self, chosen: Sequence[int]) -> Iterator[tuple[Tile, int]]:
        """``kinds`` of the tiles of these numbers."""
        found: dict[tuple[tuple[int, int], ...], tuple[int, int]] = {}
        for number in chosen:
            start = self.grid.core(number).start
            kind = tuple(self._axis_kind(axis, place) for axis, place in enumerate(start))
            first, alike = found.get(kind, (number, 0))
            found[kind] = first, alike + 1
        for first, alike in found.values():
            yield self.tile(first), alike

    def _axis_kind(self, axis: int, start: int) -> tuple[int, int]:
        """How far a core that starts there is from both borders, or that it is far from them."""
        length, side = self.grid.shape[axis], self.grid.tile[axis]
        window = self.reach.window.size[axis] if self.reach.window else 0
        far = self.reach.halo_with_window.largest + self.crf_halo.largest + window + side
        return min(start, far), min(length - start, far)

    @property
    def covered_pixels(self) -> int:
        """Of the scene, those in cores of tiles that run."""
        if self.chosen is None:
            return Region.whole(self.grid.shape).size
        return sum(self.grid.core(number).size for number in self.chosen)

    @property
    def read_ratio(self) -> float:
        """Pixels that tiles read over those of the padded scene; 1.0 means no halo.

        Over those of the cores where not all tiles run.
        """
        read = sum(alike * tile.read.size for tile, alike in self.kinds())
        if self.chosen is not None:
            return read / self.covered_pixels
        return read / Region.whole(self.grid.padded_shape).size


class Sweep(Protocol):
    """Any pass: tiles of one case that need nothing of one another."""

    @property
    def name(self) -> str:
        """In the ledger's keys."""

    @property
    def needs(self) -> str:
        """The pass whose results this one reads, by name; empty where there is none."""

    @property
    def bears_gaps(self) -> bool:
        """Whether a tile that failed there is all that fails here, or every tile does."""

    def __len__(self) -> int: ...

    def tiles(self) -> Iterator[Tile]:
        """In the order they must run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePlan:
    """The passes of a run and the fingerprint that names it."""

    passes: tuple[Sweep, ...]

    fingerprint: str
    """SHA-256 over everything that decides the bytes of the result."""

    peak_bytes: int
    """Predicted peak memory of driver and actors together, in bytes."""

    store_bytes: int
    """Uncompressed bytes of the mask store, and of the scores when they were asked for."""

    def __len__(self) -> int:
        return sum(len(sweep) for sweep in self.passes)

    def tiles(self) -> Iterator[Tile]:
        """All tiles of all passes, in the order they must run."""
        for sweep in self.passes:
            yield from sweep.tiles()
