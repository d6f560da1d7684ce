"""The oracle: one tile after another, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing

from pipeline.domain import Tile
from pipeline.execution.queue import TileQueue
from pipeline.execution.worker import TileWorker
from pipeline.ports import Record, Work


class SerialBackend:
    """Runs every tile here and now; every other backend must give the same bytes."""

    def run(
        self, work: Work, tiles: Iterable[Tile], *, stop: Callable[[], bool]
    ) -> Iterator[Record]:
        """Yield one record per tile, in order but for retries."""
        queue = TileQueue(tiles)
        with closing(TileWorker(work)) as worker:
            while not stop() and (tile := queue.take(alone=True)) is not None:
                record = queue.settle(tile, worker.run(tile))
                if record is not None:
                    yield record
