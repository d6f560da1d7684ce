"""The jobs of many cases in turn, so that a small case does not wait behind a giant one. No I/O."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterable, Sequence

from pipeline.ports import Job


class _Case:
    """The stretches of one case; a worker keeps to its own while something is left of it."""

    def __init__(self, stretches: Iterable[Sequence[Job] | None]) -> None:
        self._stretches, self._over = iter(stretches), False
        self._next: deque[Job] = deque()
        self._begun: dict[Hashable, deque[Job]] = {}

    def take(self, worker: Hashable) -> Job | None:
        """The next job of the worker's stretch, or of one that is new to it."""
        stretch = self._begun.pop(worker, None) or self._another()
        if not stretch:
            return None
        job = stretch.popleft()
        if stretch:
            self._begun[worker] = stretch
        return job

    @property
    def used_up(self) -> bool:
        """True when every job was taken and none will come."""
        return not self._begun and not self._peek() and self._over

    def _peek(self) -> deque[Job]:
        """A stretch that nobody has begun; empty where there is none, or none now."""
        while not self._next and not self._over:
            try:
                jobs = next(self._stretches)
            except StopIteration:
                self._over = True
                break
            if jobs is None:
                break
            self._next = deque(jobs)
        return self._next

    def _another(self) -> deque[Job] | None:
        """A stretch that nobody has begun, else the far half of the longest that is left."""
        if self._peek():
            fresh, self._next = self._next, deque()
            return fresh
        # Of a worker that is busy, or that died.
        holder = max(self._begun, key=lambda worker: len(self._begun[worker]), default=None)
        if holder is None:
            return None
        longest = list(self._begun.pop(holder))
        middle = len(longest) // 2
        if middle:
            self._begun[holder] = deque(longest[:middle])
        return deque(longest[middle:])


class FairFeed:
    """One job of each open case after another; within a stretch of a case the order is kept.

    A worker gets the jobs of one stretch until it is used up: neighbours share what they read.
    One thread may add cases while another takes jobs. A stretch is made when its first job is
    taken, so that the tiles of a giant case never exist all at once.
    """

    def __init__(self) -> None:
        self._cases: deque[_Case] = deque()
        self._closed = self._held_up = False
        self._changed = threading.Condition()

    def add(self, stretches: Iterable[Sequence[Job] | None]) -> None:
        """Open a case; its turn comes after those of the cases that are open.

        None among its stretches means that it has none now: tiles that are under way must end
        first.
        """
        with self._changed:
            assert not self._closed, "a case was added to a closed feed"
            self._cases.append(_Case(stretches))
            self._held_up = False
            self._changed.notify_all()

    def close(self) -> None:
        """Say that no case will come any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self, worker: Hashable) -> Job | None:
        """The next job for ``worker``; None when there is none now.

        Raises what the jobs of a case raise; that case is over then, the others go on.
        """
        with self._changed:
            self._held_up = False
            for _ in range(len(self._cases)):
                case = self._cases.popleft()
                job = case.take(worker)
                if job is not None or not case.used_up:
                    self._cases.append(case)
                if job is not None:
                    return job
            self._held_up = bool(self._cases)
            return None

    @property
    def ended(self) -> bool:
        """True when every case is used up and none will come.

        Raises what the jobs of a case raise; that case is over then.
        """
        with self._changed:
            while self._cases:
                case = self._cases.popleft()
                if not case.used_up:
                    self._cases.appendleft(case)
                    return False
            return self._closed

    def wait(self, timeout_s: float) -> None:
        """Return when a job may be had or none will come, or when ``timeout_s`` seconds passed."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._held_up and (self._cases or self._closed), timeout_s
            )
