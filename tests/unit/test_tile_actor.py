"""The mailbox of an actor: every answer is given once, to whoever waits last."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from pipeline.domain import Region, Tile, TileKey
from pipeline.errors import LeaseHeldError
from pipeline.execution.actor import Answer, TileActor
from pipeline.ports import Job, Record

SOON_S = 10.0


@dataclass
class NoModel:
    key: str = "model"

    def load(self) -> None:
        """Nothing."""


@dataclass
class Gated:
    """Tiles below ``shut`` are read when the gate opens; ``stale`` ones raise."""

    shut: int = 0
    stale: frozenset[int] = frozenset()
    gate: threading.Event = field(default_factory=threading.Event)
    model: NoModel = field(default_factory=NoModel)
    key: str = "work"

    def read(self, tile: Tile) -> None:
        if tile.key.number < self.shut:
            assert self.gate.wait(SOON_S)
        if tile.key.number in self.stale:
            raise LeaseHeldError("another run has taken over")

    def compute(self, model: None, tile: Tile, data: None) -> None:
        """Nothing."""

    def refine(self, tile: Tile, data: None) -> None:
        """Nothing."""

    def write(self, tile: Tile, result: Any) -> Record:
        return Record(key=tile.key, status="done")


def jobs(work: Gated, *numbers: int) -> list[Job]:
    box = Region.whole((4,))
    keys = [TileKey("scene", "segment", number) for number in numbers]
    return [Job(work=work, tile=Tile(key=k, core=box, scored=box, read=box)) for k in keys]


def numbers(answers: list[Answer]) -> list[int]:
    return [key.number for key, _ in answers]


def gather(actor: TileActor, count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        found += numbers(actor.exchange(()))
    return found


def waiting(actor: TileActor, *asked: Job) -> Future[list[Answer]]:
    return ThreadPoolExecutor(1).submit(actor.exchange, asked)


@pytest.fixture
def actor() -> TileActor:
    return TileActor()


def test_every_job_is_answered_once_however_they_came(actor: TileActor) -> None:
    """A tile would be lost between two messages, or be noted twice."""
    work = Gated()
    found = numbers(actor.exchange(jobs(work, 0, 1, 2)))
    found += numbers(actor.exchange(jobs(work, 3, 4)))
    assert sorted(found + gather(actor, 5 - len(found))) == [0, 1, 2, 3, 4]


def test_answers_that_came_meanwhile_travel_together(actor: TileActor) -> None:
    """Quick tiles would cost a message each, and a pool of many actors slow down by them."""
    messages = [actor.exchange(jobs(Gated(), 0, 1, 2, 3))]
    time.sleep(0.2)
    while sum(map(len, messages)) < 4:
        messages.append(actor.exchange(()))
    assert len(messages) <= 2


def test_a_tile_that_ends_is_told_of_while_a_slow_one_runs(actor: TileActor) -> None:
    """The record of a tile would wait for the slowest one that came with it."""
    work = Gated(shut=1)
    assert numbers(actor.exchange(jobs(work, 5, 0))) == [5]
    work.gate.set()
    assert gather(actor, 1) == [0]


def test_a_later_exchange_takes_the_place_of_one_that_waits(actor: TileActor) -> None:
    """Jobs that come late would each leave a call behind that waits, and soon none would fit."""
    work = Gated(shut=2)
    first = waiting(actor, *jobs(work, 0))
    time.sleep(0.1)
    assert not first.done()
    second = waiting(actor, *jobs(work, 1))
    assert first.result(SOON_S) == []
    assert not second.done()
    work.gate.set()
    found = numbers(second.result(SOON_S))
    assert sorted(found + gather(actor, 2 - len(found))) == [0, 1]


def test_a_job_that_was_recalled_is_given_back_without_a_record(actor: TileActor) -> None:
    """A tile would wait behind a slow one while another actor idles, or be lost on the way."""
    work = Gated(shut=3)
    recalled = waiting(actor, *jobs(work, 0, 1, 2))
    time.sleep(0.1)
    actor.recall()
    answers = recalled.result(SOON_S)
    while len(answers) < 2:
        answers += actor.exchange(())
    work.gate.set()
    answers += actor.exchange(())
    assert [record is None for _, record in answers] == [True, True, False]
    assert sorted(numbers(answers)) == [0, 1, 2]


def test_what_ends_a_run_is_raised(actor: TileActor) -> None:
    """The pool would never hear that another run has taken over, and wait."""
    with pytest.raises(LeaseHeldError, match="taken over"):
        actor.exchange(jobs(Gated(stale=frozenset({1})), 1))
