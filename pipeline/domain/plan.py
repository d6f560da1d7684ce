"""All tiles of a run, before anything runs: inert values that can be printed and compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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

    def __len__(self) -> int:
        return len(self.grid)

    def tile(self, number: int) -> Tile:
        """Tile ``number`` in row-major order."""
        core, padded = self.grid.core(number), self.grid.padded_shape
        scored = core.grow(self.crf_halo).align(self.grid.stride).clip(padded)
        read = self.reach.read(scored, shape=padded)
        key = TileKey(self.case, self.name, number)
        return Tile(key=key, core=core, scored=scored, read=read)

    def tiles(self) -> Iterator[Tile]:
        """All tiles, row-major."""
        return (self.tile(number) for number in range(len(self)))

    @property
    def read_voxels(self) -> int:
        """Voxels read (and computed by a network that runs a tile at once), all tiles summed."""
        return sum(tile.read.size for tile in self.tiles())

    @property
    def halo_work_ratio(self) -> float:
        """Voxels computed over voxels of the padded scene; 1.0 means no halo work."""
        return self.read_voxels / Region.whole(self.grid.padded_shape).size


class Sweep(Protocol):
    """Any pass: tiles of one case that need nothing of one another."""

    @property
    def name(self) -> str:
        """In the ledger's keys."""

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
