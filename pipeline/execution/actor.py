"""A worker and its mailbox: tiles come and records go, as many at a time as there are. No Ray."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

from pipeline.domain import TileKey
from pipeline.execution.identity import package_digest
from pipeline.execution.worker import Begun, TileWorker
from pipeline.ports import Job, Record

Answer = tuple[TileKey, Record | None]
"""What became of a tile; None where it was recalled before it was begun."""


class TileActor:
    """A TileWorker that first proves where it stands, and then exchanges jobs for answers.

    A message costs as much as a small tile, however much it carries. A pool that is busy comes
    late, finds several answers, and brings as many jobs: so fewer messages do the more work.
    """

    def __init__(self) -> None:
        self._worker = TileWorker()
        self._changed = threading.Condition()
        # Not in the callbacks: a promise that holds itself keeps the arrays of what failed.
        self._begun: dict[Future[Any], Begun] = {}
        self._passed: list[Begun] = []
        self._exchanges = 0

    def start(self, nonce: Path) -> tuple[str, str, str]:
        """Process name, package digest, and the file that holds the nonce as read here."""
        text = nonce.read_text() if nonce.exists() else ""
        # Not the process id, which an actor on another host may have, too.
        answer = nonce.with_name(f"{nonce.name}.{secrets.token_hex(8)}")
        if text:
            answer.write_text(text)
        return self._worker.name, package_digest(), answer.name

    def exchange(self, jobs: Sequence[Job]) -> list[Answer]:
        """Begin ``jobs``; return every answer there is, once there is one.

        Nothing when another exchange begins before that: it waits then in place of this one.
        Raises as ``TileWorker.end``.
        """
        for job in jobs:
            begun = self._worker.begin(job)
            self._begun[begun.passed] = begun
            begun.passed.add_done_callback(self._tell)
        with self._changed:
            self._exchanges = mine = self._exchanges + 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._passed or self._exchanges > mine)
            passed, self._passed = self._passed, []
        return [(begun.tile.key, self._record(begun)) for begun in passed]

    def recall(self) -> None:
        """Give back the tiles that were not begun: another worker has nothing to do."""
        self._worker.recall()

    def _tell(self, passed: Future[Any]) -> None:
        with self._changed:
            self._passed.append(self._begun.pop(passed))
            self._changed.notify_all()

    def _record(self, begun: Begun) -> Record | None:
        try:
            return self._worker.end(begun)
        except CancelledError:
            return None
