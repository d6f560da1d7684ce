"""What becomes of a tile that fails or kills its worker. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import replace

from pipeline.domain import TileKey
from pipeline.ports import Feed, Job, Record

MAX_ATTEMPTS = 2
MAX_DEATHS = 3


class TileQueue:
    """Jobs as the feed gives them; failed ones come back at the end, suspects of a death alone.

    When a worker dies, every tile it held is a suspect. A suspect is tried again by itself, so
    that an innocent tile is not quarantined together with the one that kills. Suspects go first:
    nothing else is handed to a busy worker until they have found an idle one.
    """

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._again: deque[Job] = deque()
        self._turn = False
        self._suspects: deque[Job] = deque()
        self._attempts: dict[TileKey, int] = {}
        self._deaths: dict[TileKey, int] = {}

    def take(self, worker: Hashable, *, alone: bool) -> Job | None:
        """The next job for ``worker``, or None; a suspect only while it is ``alone``.

        Raises what the feed raises.
        """
        if self._suspects:
            return self._suspects.popleft() if alone else None
        self._turn = not self._turn
        if self._turn and self._again:  # or failed tiles would wait for the end of a giant case
            return self._again.popleft()
        job = self._feed.take(worker)
        if job is None and self._again:
            return self._again.popleft()
        return job

    def is_suspect(self, job: Job) -> bool:
        """True for a tile that was in flight when a worker died."""
        return job.tile.key in self._deaths

    @property
    def held(self) -> int:
        """How many jobs wait that the feed has given."""
        return len(self._again) + len(self._suspects)

    @property
    def empty(self) -> bool:
        """True when nothing is left to hand out and nothing more will come.

        Raises what the feed raises.
        """
        return not self.held and self._feed.ended

    def settle(self, job: Job, record: Record | None) -> Record | None:
        """The record if it is final; None when the tile goes back into the queue.

        ``record`` is None for a tile that was recalled before it was begun.
        """
        key = job.tile.key
        if record is None:
            self._again.append(job)
            return None
        if record.status == "failed":
            self._attempts[key] = self._attempts.get(key, 0) + 1
            if self._attempts[key] < MAX_ATTEMPTS:
                (self._suspects if self.is_suspect(job) else self._again).append(job)
                return None
        self._attempts.pop(key, None)
        deaths = self._deaths.pop(key, 0)
        return replace(record, deaths=deaths) if deaths else record

    def died(self, job: Job, *, error: str) -> Record | None:
        """Note a worker's death; a record when the tile is quarantined, None when it goes back."""
        key = job.tile.key
        deaths = self._deaths[key] = self._deaths.get(key, 0) + 1
        if deaths >= MAX_DEATHS:
            del self._deaths[key]
            return Record(key=key, status="failed", deaths=deaths, error=error)
        self._suspects.append(job)
        return None
