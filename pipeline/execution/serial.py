"""The oracle: one tile after another, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

from pipeline.execution.queue import TileQueue
from pipeline.execution.worker import TileWorker
from pipeline.ports import Feed, Record

POLL_S = 0.1
"""How often ``stop`` is asked while the feed has nothing."""


class SerialBackend:
    """Runs every tile here and now; every other backend must give the same bytes."""

    def run(self, feed: Feed, *, stop: Callable[[], bool]) -> Iterator[Record]:
        """A record per tile, in the feed's order but for retries. Raises as ``TileWorker.run``."""
        queue = TileQueue(feed)
        with closing(TileWorker()) as worker:
            while not (stop() or queue.empty):
                job = queue.take(worker.name, alone=True)
                if job is None:
                    feed.wait(POLL_S)
                    continue
                record = queue.settle(job, worker.run(job))
                if record is not None:
                    yield record
