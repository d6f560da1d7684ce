"""The jobs of many cases in turn, so that a small case does not wait behind a giant one. No I/O."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from itertools import groupby

from pipeline.ports import Job

SPARED = 8
"""Jobs of a worker that holds what they need, of which none is given to another: elsewhere one
takes as long as these do here (six to eight times, measured)."""


class _Case:
    """The stretches of one case; a worker keeps to its own while something is left of it."""

    def __init__(self, stretches: Iterable[Sequence[Job] | None]) -> None:
        self._stretches, self._over = iter(stretches), False
        self._fresh: deque[deque[Job]] = deque()
        self._homes: dict[Hashable, deque[Job]] = {}
        self._begun: dict[Hashable, deque[Job]] = {}
        self._gone: set[Hashable] = set()

    def take(self, worker: Hashable) -> Job | None:
        """The next job of the worker's stretch, or of one that is new to it."""
        stretch = self._begun.pop(worker, None) or self._another(worker)
        if not stretch:
            return None
        job = stretch.popleft()
        if stretch:
            self._begun[worker] = stretch
        return job

    def lost(self, worker: Hashable) -> None:
        """What the worker had begun or was the home of is for all."""
        self._gone.add(worker)
        for jobs in (self._begun.pop(worker, None), self._homes.pop(worker, None)):
            if jobs:
                self._fresh.append(jobs)

    @property
    def used_up(self) -> bool:
        """True when every job was taken and none will come."""
        self._make(None)
        return self._over and not (self._begun or self._homes or self._fresh)

    def _make(self, worker: Hashable) -> None:
        """Make stretches until there is one for ``worker``, or none now.

        Jobs that are at home elsewhere are laid aside: no more than workers hold.
        """
        while not (self._fresh or worker in self._homes or self._over):
            try:
                jobs = next(self._stretches)
            except StopIteration:
                self._over = True
                break
            if jobs is None:
                break
            for home, run in groupby(jobs, lambda job: job.home):
                if home and home not in self._gone:
                    self._homes.setdefault(home, deque()).extend(run)
                else:
                    self._fresh.append(deque(run))

    def _another(self, worker: Hashable) -> deque[Job] | None:
        """Jobs at home here, a stretch that nobody has begun, or a part of another worker's."""
        self._make(worker)
        if worker in self._homes:
            return self._homes.pop(worker)
        return self._fresh.popleft() if self._fresh else self._share()

    def _share(self) -> deque[Job] | None:
        """The far half of the longest stretch of a worker that is busy, or that died.

        Of jobs where they are at home the last one, if it would have to wait for long.
        """
        held = [(pile, holder) for pile in (self._begun, self._homes) for holder in pile]
        spare = [(p, h) for p, h in held if not p[h][-1].home or len(p[h]) > SPARED]
        if not spare:
            return None
        pile, holder = max(spare, key=lambda at: len(at[0][at[1]]))
        longest = list(pile.pop(holder))
        left = len(longest) - 1 if longest[-1].home else len(longest) // 2
        if left:
            pile[holder] = deque(longest[:left])
        return deque(longest[left:])


class FairFeed:
    """One job of each open case after another; within a stretch of a case the order is kept.

    A worker gets the jobs of one stretch until it is used up: neighbours share what they read. It
    gets those that are at home there first, and others leave it them.
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

    def lost(self, worker: Hashable) -> None:
        """Say that the worker takes no more: what was left for it is for all."""
        with self._changed:
            for case in self._cases:
                case.lost(worker)
            self._held_up = False
            self._changed.notify_all()

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
