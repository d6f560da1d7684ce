"""What is left to do, and what becomes of a tile that fails or kills its worker. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from pipeline.domain import Tile, TileKey
from pipeline.ports import Record

MAX_ATTEMPTS = 2
MAX_DEATHS = 3


class TileQueue:
    """Tiles in order; failed ones come back at the end, suspects of a death only alone.

    When a worker dies, every tile it held is a suspect. A suspect is tried again by itself, so
    that an innocent tile is not quarantined together with the one that kills.
    """

    def __init__(self, tiles: Iterable[Tile]) -> None:
        self._fresh = iter(tiles)
        self._next = next(self._fresh, None)
        self._again: deque[Tile] = deque()
        self._suspects: deque[Tile] = deque()
        self._attempts: dict[TileKey, int] = {}
        self._deaths: dict[TileKey, int] = {}

    def take(self, *, alone: bool) -> Tile | None:
        """The next tile, or None. A suspect is handed out only to a worker that is ``alone``."""
        if alone and self._suspects:
            return self._suspects.popleft()
        if self._next is None:
            return self._again.popleft() if self._again else None
        tile, self._next = self._next, next(self._fresh, None)
        return tile

    def is_suspect(self, tile: Tile) -> bool:
        """True for a tile that was in flight when a worker died."""
        return tile.key in self._deaths

    @property
    def empty(self) -> bool:
        """True when nothing is left to hand out."""
        return self._next is None and not self._again and not self._suspects

    def settle(self, tile: Tile, record: Record) -> Record | None:
        """The record if it is final; None when a failed tile goes back into the queue."""
        if record.status == "done":
            return record
        self._attempts[tile.key] = self._attempts.get(tile.key, 0) + 1
        if self._attempts[tile.key] >= MAX_ATTEMPTS:
            return record
        self._again.append(tile)
        return None

    def died(self, tile: Tile, *, error: str) -> Record | None:
        """Note a worker's death; a record when the tile is quarantined, None when it goes back."""
        deaths = self._deaths[tile.key] = self._deaths.get(tile.key, 0) + 1
        if deaths >= MAX_DEATHS:
            return Record(key=tile.key, status="failed", deaths=deaths, error=error)
        self._suspects.append(tile)
        return None
