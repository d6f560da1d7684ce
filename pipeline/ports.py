"""The edges of the system, as Protocols: who reads, who writes, who remembers, who runs.

Axes in array names: C channel, K class, S space, (y, x) or (z, y, x). Instances are picklable and
open files lazily, in the process that uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.domain import ImageInfo, Region, Tile, TileKey


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """What ``Source.read(region)`` returns."""

    image_CS: NDArray[Any]
    """(C, *S), the source's native dtype, native byte order."""

    valid_S: NDArray[np.bool_]
    """(*S); False where the pixel is nodata, NaN, masked or transparent in any channel."""

    def bands(self, channels: Sequence[int]) -> Block:
        """Those at these places, in this order; the block itself where that is all it has."""
        if tuple(channels) == tuple(range(len(self.image_CS))):  # picked, all would be copied
            return self
        return Block(self.image_CS[list(channels)], self.valid_S)


class Source(Protocol):
    """A readable image."""

    @property
    def info(self) -> ImageInfo:
        """Shape, channels and geometry. Raises SourceError."""

    def unpack(self) -> None:
        """Unpack what can only be read whole, once, before many readers ask for regions of it.

        Raises SourceError for what is damaged, SourceReadError where a disk is at fault.
        """

    def read(self, region: Region) -> Block:
        """Return ``region``, which lies inside the image. Raises SourceReadError."""

    def digest(self) -> str:
        """Identity of the content, equal on every machine. Raises SourceReadError."""


class Area(Hashable, Protocol):
    """Where labels are wanted. Instances are picklable."""

    @property
    def digest(self) -> str:
        """Identity of what it was read from, equal on every machine."""

    @property
    def bounds(self) -> Region:
        """A box of the image that holds all of it."""

    def inside(self, region: Region) -> NDArray[np.bool_]:
        """(*S) bool, new: the pixels of ``region`` that lie inside, whatever region asks.

        Raises SourceReadError.
        """

    def touches(self, region: Region) -> bool:
        """Whether any pixel of ``region`` lies inside. Raises SourceReadError."""


class ArrayStore(Protocol):
    """A chunked array on storage that many processes share: the mask, or the scores."""

    def write(self, region: Region, array: NDArray[Any]) -> str:
        """Store whole chunks and return the SHA-256 of the array's bytes. Raises StoreError."""

    def read(self, region: Region) -> NDArray[Any]:
        """Return ``region``; the fill value where nothing was written. Raises StoreError."""


class PieceStore(Protocol):
    """Small arrays on storage that many processes share, each under the region that it is of."""

    def write(self, region: Region, array: NDArray[Any]) -> None:
        """Keep it whole or not at all. Raises StoreError."""

    def read(self, region: Region) -> NDArray[Any] | None:
        """What was kept of exactly this region; None where nothing was. Raises StoreError."""


class RowStore(Protocol):
    """What the tiles of a scene tell one another, round by round, on storage that all share."""

    def write(self, turn: int, number: int, rows: Mapping[str, NDArray[Any]]) -> str:
        """Keep all that a tile tells in a round, or nothing; its SHA-256. Raises StoreError."""

    def read(self, turn: int, number: int, names: Sequence[str]) -> list[NDArray[Any]]:
        """Some of what a tile told in a round. Raises StoreError, where it told nothing as well."""


Status = Literal["done", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line of the ledger: what became of a tile."""

    key: TileKey
    status: Status

    digest: str = ""
    """SHA-256 of the mask written; empty for a failed tile."""

    scores_digest: str = ""
    """SHA-256 of the scores written; empty where none were asked for."""

    worker: str = ""
    """``host:pid`` of the process that did it."""

    loads: int = 0
    """How many models that process had loaded so far when it did this tile."""

    skipped: bool = False
    """True where no pixel of the core was valid, so that nothing was computed."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds per stage: read, compute, refine, write."""

    waits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Seconds that a stage of that process stood idle around this tile, by what it waited for:
    another stage, or ``tile`` where none was there."""

    peak_bytes: int = 0
    """Peak resident memory of that process so far, in bytes."""

    counts: Mapping[int, int] = field(default_factory=dict)
    """Pixels per value written, nodata included."""

    areas: Mapping[int, float] = field(default_factory=dict)
    """The same in m2; empty where all pixels of the image are alike."""

    sent_bytes: int = 0
    """Of what this tile told its neighbours, in a pass where tiles do."""

    vertices: int = 0
    """Of a lattice under all tiles, those that this tile's pixels touch."""

    kept: bool = False
    """Whether that process holds what it made of the tile, so that the next pass is best done
    there."""

    deaths: int = 0
    """How many workers died while they held this tile."""

    error: str = ""
    """One line; empty unless failed."""


class Ledger(Protocol):
    """What is done and what failed; the truth about progress."""

    def records(self) -> dict[TileKey, Record]:
        """The latest record of every tile seen. Raises StoreError."""

    def append(self, record: Record) -> None:
        """Add a line; on return it survives the death of this process. Raises StoreError."""


class Guard(Protocol):
    """Proof that this run still owns its directory; checked before every write."""

    def check(self) -> None:
        """Raise LeaseHeldError when another run has taken over."""


class Tracker(Protocol):
    """Where a run is written down for people: MLflow, or nowhere."""

    @property
    def run_id(self) -> str | None:
        """Identifier of the run at the tracker; None where there is none."""

    def start(self, *, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Open the run, or the one that an interrupted run had opened."""

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Log figures at ``step`` (tiles done)."""

    def finish(self, status: str, *, artifacts: Iterable[Path]) -> None:
        """Close the run as ``done``, ``partial``, ``failed`` or ``interrupted``."""


class Model(Protocol):
    """A picklable recipe for what a worker loads once and keeps for every case that shares it."""

    @property
    def key(self) -> str:
        """Equal keys mean the same model on the same device with the same threads."""

    def load(self) -> Any:
        """Load it, in the worker's device thread. What it raises ends the run."""


class Work(Protocol):
    """A picklable recipe for what is done with the tiles of one case."""

    @property
    def key(self) -> str:
        """Equal keys mean equal work: a worker keeps the instance it has, open files and all."""

    @property
    def model(self) -> Model:
        """What must be loaded before the second stage."""

    def read(self, tile: Tile) -> Any:
        """First stage: input."""

    def compute(self, model: Any, tile: Tile, data: Any) -> Any:
        """Second stage: the device; ``model`` is what ``self.model.load()`` returned."""

    def refine(self, tile: Tile, data: Any) -> Any:
        """Third stage, beside the device: from what it computed to what is written."""

    def write(self, tile: Tile, result: Any) -> Record:
        """Fourth stage: whole chunks, then the record for the ledger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One tile and what is done with it: all that travels to a worker."""

    work: Work
    tile: Tile

    home: str = ""
    """The worker that holds what the tile's next pass needs; empty where none does."""


class Feed(Protocol):
    """Jobs of many cases, more of which may come while they run."""

    def take(self, worker: Hashable) -> Job | None:
        """The next job for ``worker``, near its last one where that can be; None if there is none.

        Raises what a case's own jobs raise.
        """

    def lost(self, worker: Hashable) -> None:
        """Say that it will take no more: what was for it is for all."""

    @property
    def ended(self) -> bool:
        """True when no job is left and none will come. Raises what a case's own jobs raise."""

    def wait(self, timeout_s: float) -> None:
        """Return when a job may have come, or the feed ended, or ``timeout_s`` seconds passed."""


class Backend(Protocol):
    """Who runs the tiles. ``SerialBackend`` is the oracle: all give the same bytes."""

    def run(self, feed: Feed, *, stop: Callable[[], bool]) -> Iterator[Record]:
        """Yield a record per tile, in any order; after ``stop()`` only of those in flight."""
