"""The queue decides what becomes of tiles that fail or kill; these are its rules."""

from __future__ import annotations

import pytest

from pipeline.domain import Grid, Halo, Pass, Reach
from pipeline.execution.feed import FairFeed
from pipeline.execution.queue import MAX_ATTEMPTS, MAX_DEATHS, TileQueue
from pipeline.ports import Job, Record


@pytest.fixture
def jobs() -> list[Job]:
    sweep = Pass(
        case="scene",
        name="segment",
        grid=Grid(shape=(8, 8), tile=(4, 4), stride=4),
        reach=Reach(stride=4, halo=Halo.uniform(4, ndim=2)),
        crf_halo=Halo.uniform(0, ndim=2),
    )
    return [Job(work=None, tile=tile) for tile in sweep.tiles()]  # type: ignore[arg-type]


def queue_of(jobs: list[Job]) -> TileQueue:
    feed = FairFeed()
    feed.add([jobs])
    feed.close()
    return TileQueue(feed)


def failed(job: Job) -> Record:
    return Record(key=job.tile.key, status="failed", error="bad")


def done(job: Job) -> Record:
    return Record(key=job.tile.key, status="done")


def test_tiles_come_out_once_each_in_order(jobs: list[Job]) -> None:
    """A queue that repeats or drops a tile would lose or redo work."""
    queue = queue_of(jobs)
    taken = []
    while (job := queue.take(0, alone=True)) is not None:
        taken.append(job)
    assert taken == jobs
    assert queue.empty


def test_a_failed_tile_comes_back_among_the_fresh_ones_and_is_then_given_up(
    jobs: list[Job],
) -> None:
    """Bad cases would wait for the end of a giant one; without a last attempt, for ever."""
    queue = queue_of(jobs)
    first = queue.take(0, alone=True)
    assert first is not None
    assert queue.settle(first, failed(first)) is None
    soon = [queue.take(0, alone=True), queue.take(0, alone=True)]
    assert first in soon
    for _ in jobs[2:]:
        queue.take(0, alone=True)
    assert MAX_ATTEMPTS == 2
    assert queue.settle(first, failed(first)) == failed(first)
    assert queue.empty


def test_a_suspect_is_handed_only_to_a_worker_that_is_alone(jobs: list[Job]) -> None:
    """Two suspects on one worker would convict the innocent one with the killer."""
    queue = queue_of(jobs[:2])
    a, b = queue.take(0, alone=True), queue.take(0, alone=False)
    assert a is not None
    assert b is not None
    assert queue.died(a, error="x") is None
    assert queue.died(b, error="x") is None
    assert queue.take(0, alone=False) is None
    assert not queue.empty
    assert queue.take(0, alone=True) == a
    assert queue.is_suspect(a)


def test_a_tile_that_keeps_killing_is_quarantined_with_its_deaths(jobs: list[Job]) -> None:
    """A poison tile must end as a failed record, never as an endless loop."""
    queue = queue_of(jobs[:1])
    record = None
    for _ in range(MAX_DEATHS):
        assert record is None
        job = queue.take(0, alone=True)
        assert job is not None
        record = queue.died(job, error="the worker died")
    assert record is not None
    assert (record.status, record.deaths, record.error) == ("failed", 3, "the worker died")
    assert queue.empty


def test_a_busy_worker_gets_nothing_while_a_suspect_waits(jobs: list[Job]) -> None:
    """With a long feed no worker would ever be idle, and a lost tile wait for the end of it."""
    queue = queue_of(jobs)
    lost, kept = queue.take(0, alone=True), queue.take(0, alone=True)
    assert lost is not None
    assert kept is not None
    queue.died(lost, error="x")
    assert queue.held == 1
    assert queue.take(0, alone=False) is None
    assert queue.take(0, alone=True) == lost
    assert queue.take(0, alone=False) == jobs[2]


def test_a_suspect_that_fails_is_tried_again_alone(jobs: list[Job]) -> None:
    """A tile that raises one time and kills the next would take an innocent one along."""
    queue = queue_of(jobs[:1])
    suspect = queue.take(0, alone=True)
    assert suspect is not None
    queue.died(suspect, error="x")
    assert queue.take(0, alone=True) == suspect
    assert queue.settle(suspect, failed(suspect)) is None
    assert queue.take(0, alone=False) is None
    assert queue.take(0, alone=True) == suspect


def test_the_record_of_a_tile_says_how_many_workers_died_on_it(jobs: list[Job]) -> None:
    """Lost nodes would not show in the ledger."""
    queue = queue_of(jobs[:1])
    job = queue.take(0, alone=True)
    assert job is not None
    queue.died(job, error="x")
    assert queue.take(0, alone=True) == job
    record = queue.settle(job, done(job))
    assert record is not None
    assert (record.status, record.deaths) == ("done", 1)
    assert not queue.is_suspect(job)


def test_a_queue_is_not_empty_while_more_may_come(jobs: list[Job]) -> None:
    """A pool would end in the pause between two scenes."""
    feed = FairFeed()
    queue = TileQueue(feed)
    assert queue.take(0, alone=True) is None
    assert not queue.empty
    feed.add([jobs[:1]])
    assert queue.take(0, alone=True) == jobs[0]
    feed.close()
    assert queue.take(0, alone=True) is None
    assert queue.empty


def test_a_job_that_was_recalled_is_handed_out_again_without_a_blemish(jobs: list[Job]) -> None:
    """A recalled tile would be lost, or be quarantined a try too early."""
    queue = queue_of(jobs[:1])
    job = queue.take(0, alone=True)
    assert job is not None
    assert queue.settle(job, None) is None
    assert not queue.empty
    assert queue.take(1, alone=False) == job
    assert not queue.is_suspect(job)
    assert queue.settle(job, failed(job)) is None
