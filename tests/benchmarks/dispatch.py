"""``make bench-dispatch``: how many tiles a second can be handed out and noted when each is empty?

Through the real pool, worker and ledger; the work alone is nothing. Two actors against eight.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.ledger_file import LedgerFile
from pipeline.domain import Region, Tile, TileKey
from pipeline.execution.feed import FairFeed
from pipeline.execution.ray_pool import RayBackend
from pipeline.ports import Job, Record

ACTORS = (2, 8)
TILES = 20_000
"""That are counted."""


@dataclass(frozen=True)
class NoModel:
    """Loads nothing."""

    key: str = "none"

    def load(self) -> None:
        """Nothing."""


@dataclass(frozen=True)
class NoWork:
    """Takes no time and makes a record as an empty tile does."""

    model: NoModel = NoModel()
    key: str = "none"

    def read(self, tile: Tile) -> None:
        """Nothing."""

    def compute(self, model: None, tile: Tile, data: None) -> None:
        """Nothing."""

    def refine(self, tile: Tile, data: None) -> None:
        """Nothing."""

    def write(self, tile: Tile, result: Any) -> Record:
        """The record of a tile without a valid pixel."""
        return Record(
            key=tile.key, status="done", digest="0" * 64, skipped=True, counts={255: tile.core.size}
        )


def rate(actors: int, folder: Path) -> float:
    """Tiles a second, noted in the ledger, once every actor is at work."""
    workers: set[str] = set()
    since: float | None = None
    count = 0

    def jobs() -> Iterator[list[Job]]:
        box, number = Region.whole((4, 4)), 0
        while count < TILES:
            key = TileKey("scene", "segment", number)
            yield [Job(work=NoWork(), tile=Tile(key=key, core=box, scored=box, read=box))]
            number += 1

    feed, ledger = FairFeed(), LedgerFile(folder / "ledger", owner="bench")
    feed.add(jobs())
    feed.close()
    backend = RayBackend(run_dir=folder, workers=actors, threads=1)
    for record in backend.run(feed, stop=lambda: False):
        ledger.append(record)
        workers.add(record.worker)
        if len(workers) == actors:
            since = since or time.monotonic()
            count += 1
            if count == TILES:
                end = time.monotonic()
    ledger.close()
    assert since is not None
    return TILES / (end - since)


def main() -> None:
    """Print tiles a second for two and for eight actors, and their ratio."""
    rates = {}
    for actors in ACTORS:
        with tempfile.TemporaryDirectory(prefix="terravox-bench-") as name:
            rates[actors] = rate(actors, Path(name))
        print(f"{actors} actors: {rates[actors]:7.0f} empty tiles/s", flush=True)
    few, many = (rates[actors] for actors in ACTORS)
    print(f"{ACTORS[1]} actors over {ACTORS[0]}: x{many / few:.2f}")


if __name__ == "__main__":
    main()
