"""A line of stages, each a thread that keeps an item until the next stage takes it. No I/O.

So there is one item a stage at most, whatever is waited for, and every idle moment has a reason:
the item has not come yet, it is still in a stage before, or the stage after has no room.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

DISPATCH = "tile"
"""What a stage waits for before an item is put on the line."""

_SHORTEST_S = 1e-4
"""Waits below are the clock's and the threads' own."""


@dataclass(slots=True)
class Turn:
    """When an item was in a stage, in seconds of one clock."""

    free: float | None
    """Since when the stage was empty; None for its first item."""

    began: float
    ended: float = 0.0
    """The stage was done with it."""

    left: float = 0.0
    """The next stage took it."""

    @property
    def busy(self) -> float:
        """How long the stage worked, in seconds."""
        return self.ended - self.began


@dataclass(slots=True)
class _Item:
    calls: Sequence[Callable[[Any], Any]]
    value: Any = None
    turns: list[Turn] = field(default_factory=list)
    done: Future[tuple[Any, list[Turn]]] = field(default_factory=Future)


class _Stage:
    """A thread that works on one item at a time.

    A thread of its own, not a lock: the C library keeps a heap for each thread, and a device whose
    tiles wander over threads holds its working memory several times (1.5 GB against 1.0, measured).
    """

    def __init__(self, name: str, *, after: _Stage | None) -> None:
        self.inbox: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self.before: _Stage | None = None
        self._after, self._taken = after, queue.SimpleQueue[float]()
        if after is not None:
            after.before = self
        # Daemon: a worker that Ray ends must not wait for it.
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _serve(self) -> None:
        free: float | None = None
        while (item := self.inbox.get()) is not None:
            free = self._take(item, free)
            del item  # or it stays until the next one comes
        if self._after is not None:
            self._after.inbox.put(None)

    def _take(self, item: _Item, free: float | None) -> float:
        """Work on an item; returns when the stage was rid of it."""
        turn = Turn(free, time.perf_counter())
        if self.before is not None:
            item.turns[-1].left = turn.began
            self.before._taken.put(turn.began)
        item.turns.append(turn)
        try:
            item.value = item.calls[len(item.turns) - 1](item.value)
        except BaseException as error:  # noqa: BLE001  it is raised where the item came from
            item.value = None
            item.done.set_exception(error)
            return time.perf_counter()
        turn.ended = turn.left = time.perf_counter()
        if self._after is None:
            item.done.set_result((item.value, item.turns))
            return turn.ended
        self._after.inbox.put(item)
        return self._taken.get()


class Line:
    """Stages one after another; with several items on the line they all work at the same time."""

    def __init__(self, *names: str) -> None:
        """``names``: of the stages and of their threads, in order."""
        self.names = names
        after: _Stage | None = None
        stages: list[_Stage] = []
        for name in reversed(names):
            after = _Stage(name, after=after)
            stages.insert(0, after)
        self._stages = stages
        for stage in stages:
            stage.start()

    def put(self, *calls: Callable[[Any], Any]) -> Future[tuple[Any, list[Turn]]]:
        """Send an item down the line, behind those that are on it.

        Args:
            calls: A function for each stage, of what the stage before returned; the first of None.

        Returns a promise of what the last one returned, and a turn for each stage. It raises what
        a call raises, and CancelledError when the item was recalled.
        """
        item = _Item(calls)
        self._stages[0].inbox.put(item)
        return item.done

    def recall(self) -> None:
        """Take back the items that no stage has begun: their promises raise CancelledError."""
        with suppress(queue.Empty):
            while (item := self._stages[0].inbox.get_nowait()) is not None:
                item.done.cancel()
            self._stages[0].inbox.put(None)  # the line is being closed

    def close(self) -> None:
        """End the threads once what is on the line has left it."""
        self._stages[0].inbox.put(None)  # each stage tells the next one


def waits(
    names: Sequence[str], turns: Sequence[Turn], *, came: float
) -> dict[str, dict[str, float]]:
    """For each stage the seconds it was idle around an item, by the stage that it waited for.

    Before the item: for it to come (``DISPATCH``), then for the stages where it still was. After
    it: for the next stage to take it. ``came`` is when it was put on the line.
    """
    found: dict[str, dict[str, float]] = {}
    for number, turn in enumerate(turns):
        reasons: dict[str, float] = {}
        if turn.free is not None:
            moments = [came, *(before.ended for before in turns[: max(number - 1, 0)])][:number]
            at = turn.free
            for reason, until in zip((DISPATCH, *names), (*moments, turn.began), strict=False):
                reasons[reason] = max(until - at, 0.0)
                at = max(at, until)
        if number + 1 < len(turns):
            reasons[names[number + 1]] = turn.left - turn.ended
        kept = {reason: round(s, 4) for reason, s in reasons.items() if s >= _SHORTEST_S}
        if kept:
            found[names[number]] = kept
    return found
