"""The jobs of many cases in turn, so that a small case does not wait behind a giant one. No I/O."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator

from pipeline.ports import Job


class FairFeed:
    """One job of each open case after another; within a case the order is kept.

    One thread may add cases while another takes jobs. Jobs are made when they are taken, so that
    the tiles of a giant case never exist all at once.
    """

    def __init__(self) -> None:
        self._cases: deque[Iterator[Job | None]] = deque()
        self._closed = self._held_up = False
        self._changed = threading.Condition()

    def add(self, jobs: Iterable[Job | None]) -> None:
        """Open a case; its turn comes after those of the cases that are open.

        None among its jobs means that it has none now: tiles that are under way must end first.
        """
        with self._changed:
            assert not self._closed, "a case was added to a closed feed"
            self._cases.append(iter(jobs))
            self._held_up = False
            self._changed.notify_all()

    def close(self) -> None:
        """Say that no case will come any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self) -> Job | None:
        """The next job; None when there is none now.

        Raises what the jobs of a case raise; that case is over then, the others go on.
        """
        with self._changed:
            self._held_up = False
            for _ in range(len(self._cases)):
                case = self._cases.popleft()
                try:
                    job = next(case)
                except StopIteration:
                    continue
                self._cases.append(case)
                if job is not None:
                    return job
            self._held_up = bool(self._cases)
            return None

    @property
    def ended(self) -> bool:
        """True when every case is used up and none will come."""
        with self._changed:
            return self._closed and not self._cases

    def wait(self, timeout_s: float) -> None:
        """Return when a job may be had or none will come, or when ``timeout_s`` seconds passed."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._held_up and (self._cases or self._closed), timeout_s
            )
