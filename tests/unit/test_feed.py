"""The feed decides whose turn it is; these are its rules."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from pipeline.domain import Region, Tile, TileKey
from pipeline.execution.feed import FairFeed
from pipeline.ports import Job


def jobs(case: str, count: int, *, stretch: int = 1) -> Iterator[list[Job]]:
    box = Region.whole((4, 4))
    for first in range(0, count, stretch):
        keys = [TileKey(case, "segment", n) for n in range(first, min(first + stretch, count))]
        tiles = [Tile(key=key, core=box, scored=box, read=box) for key in keys]
        yield [Job(work=None, tile=tile) for tile in tiles]  # type: ignore[arg-type]


def at_home(*homes: str) -> Iterator[list[Job]]:
    """A stretch for each word, a job for each of its letters, which is its home; ``-`` is none."""
    each = jobs("a", sum(map(len, homes)))
    for word in homes:
        yield [replace(next(each)[0], home=home.strip("-")) for home in word]


def taken(feed: FairFeed, *, worker: str = "w") -> list[tuple[str, int]]:
    """All that can be taken now, as (case, number)."""
    keys = []
    while (job := feed.take(worker)) is not None:
        keys.append((job.tile.key.case, job.tile.key.number))
    return keys


def numbers(feed: FairFeed, workers: str) -> list[int]:
    """What each worker, one letter each, gets in turn."""
    got = [feed.take(worker) for worker in workers]
    return [job.tile.key.number for job in got if job is not None]


def test_one_case_comes_in_its_own_order() -> None:
    """A scene whose tiles are shuffled reads its source blocks again and again."""
    feed = FairFeed()
    feed.add(jobs("a", 5))
    assert taken(feed) == [("a", n) for n in range(5)]


def test_a_small_case_does_not_wait_behind_a_giant_one() -> None:
    """A scan of two tiles would be done a day later because a country came first."""
    feed = FairFeed()
    feed.add(jobs("giant", 1000))
    first = [feed.take("w") for _ in range(3)]
    assert all(job is not None for job in first)
    feed.add(jobs("small", 2))
    feed.add(jobs("other", 1))
    order = taken(feed)
    assert order.index(("small", 1)) <= 5
    assert order.index(("other", 0)) <= 3
    assert [n for case, n in order if case == "giant"] == list(range(3, 1000))
    assert len(order) == 1000


def test_each_worker_keeps_to_a_stretch_of_neighbours() -> None:
    """Two workers that share a band both decode all of it."""
    feed = FairFeed()
    feed.add(jobs("a", 12, stretch=4))
    assert numbers(feed, "xyxyxxyzx") == [0, 4, 1, 5, 2, 3, 6, 8, 10]


def test_a_worker_without_a_stretch_takes_the_far_half_of_the_longest() -> None:
    """Workers would idle while one walks the last band alone, or follow one another through it."""
    feed = FairFeed()
    feed.add(jobs("a", 9, stretch=9))
    assert numbers(feed, "xyxyzxyyxx") == [0, 5, 1, 6, 3, 2, 7, 8, 4]
    feed.close()
    assert feed.ended


def test_what_a_lost_worker_had_left_is_done_by_others() -> None:
    """A band would be left undone with the node that had begun it."""
    feed = FairFeed()
    feed.add(jobs("a", 6, stretch=3))
    assert numbers(feed, "xy") == [0, 3]
    assert sorted(n for _, n in taken(feed, worker="y")) == [1, 2, 4, 5]


def test_stretches_are_made_when_they_are_begun() -> None:
    """The tiles of a continent would fill the driver's memory."""
    made: list[list[Job]] = []

    def counted() -> Iterator[list[Job]]:
        for job in jobs("a", 10**9):
            made.append(job)
            yield job

    feed = FairFeed()
    feed.add(counted())
    feed.take("w")
    assert len(made) == 1


def test_the_feed_ends_when_it_is_closed_and_used_up_and_not_before() -> None:
    """A backend would end early and leave tiles undone, or never end."""
    feed = FairFeed()
    assert feed.take("w") is None
    assert not feed.ended
    feed.add(jobs("a", 1))
    feed.close()
    assert not feed.ended
    assert taken(feed) == [("a", 0)]
    assert feed.ended


def test_a_case_that_raises_is_heard_of_and_the_others_go_on() -> None:
    """One bad plan would silently end, or endlessly break, the feed of a whole archive."""

    def broken() -> Iterator[list[Job]]:
        yield from jobs("broken", 1)
        raise ValueError("no plan")

    feed = FairFeed()
    feed.add(broken())
    feed.add(jobs("good", 3))
    feed.close()
    for _ in range(2):
        feed.take("w")
    with pytest.raises(ValueError, match="no plan"):
        feed.take("w")
    assert taken(feed) == [("good", 1), ("good", 2)]
    assert feed.ended


def test_waiting_ends_when_a_case_comes_or_the_feed_closes() -> None:
    """A worker would sleep its whole timeout although there is work, or for ever at the end."""
    feed = FairFeed()
    for change in (lambda: feed.add(jobs("a", 1)), feed.close):
        threading.Timer(0.05, change).start()
        start = time.monotonic()
        feed.wait(10.0)
        assert 0.03 < time.monotonic() - start < 5.0
        taken(feed)


def test_a_case_that_has_no_job_now_is_kept_and_the_others_go_on() -> None:
    """The second pass of a scene would be lost, or a whole archive wait for its first."""
    open_ = False

    def two_passes() -> Iterator[list[Job] | None]:
        yield from jobs("a", 1)
        while not open_:
            yield None
        yield from jobs("a", 2)

    feed = FairFeed()
    feed.add(two_passes())
    feed.add(jobs("b", 2))
    feed.close()
    assert taken(feed) == [("a", 0), ("b", 0), ("b", 1)]
    assert not feed.ended
    open_ = True
    assert taken(feed) == [("a", 0), ("a", 1)]
    assert feed.ended


def test_waiting_does_not_end_at_once_while_all_cases_are_held_up() -> None:
    """A driver would spin while the last tiles of a first pass are under way."""

    def held_up() -> Iterator[list[Job] | None]:
        while True:
            yield None

    feed = FairFeed()
    feed.add(held_up())
    assert feed.take("w") is None
    start = time.monotonic()
    feed.wait(0.05)
    assert 0.04 < time.monotonic() - start < 5.0
    threading.Timer(0.05, lambda: feed.add(jobs("b", 1))).start()
    start = time.monotonic()
    feed.wait(10.0)
    assert 0.03 < time.monotonic() - start < 5.0
    assert taken(feed) == [("b", 0)]


def test_waiting_ends_at_its_timeout() -> None:
    """A backend that waits must ask now and then whether to stop."""
    start = time.monotonic()
    FairFeed().wait(0.05)
    assert 0.04 < time.monotonic() - start < 5.0


def test_nothing_is_lost_or_doubled_when_threads_add_and_take() -> None:
    """Cases are opened in one thread while another feeds the workers."""
    feed, keys, lock = FairFeed(), [], threading.Lock()

    def take_all() -> None:
        while not feed.ended:
            feed.wait(0.01)
            found = taken(feed)
            with lock:
                keys.extend(found)

    takers = [threading.Thread(target=take_all) for _ in range(3)]
    for taker in takers:
        taker.start()
    for case in range(50):
        feed.add(jobs(str(case), 20))
    feed.close()
    for taker in takers:
        taker.join()
    assert sorted(keys) == sorted((str(case), n) for case in range(50) for n in range(20))


def test_what_a_worker_holds_comes_to_it_and_others_leave_it_there() -> None:
    """Each round of a scene would place its pixels anew, wherever they were placed before."""
    feed = FairFeed()
    feed.add(at_home("xxyy", "-xy-"))
    feed.close()
    assert numbers(feed, "yyyyy") == [2, 3, 6, 4, 7]
    assert feed.take("y") is None
    assert not feed.ended
    assert numbers(feed, "xxx") == [0, 1, 5]
    assert feed.ended


def test_a_worker_that_holds_much_gives_away_the_last_of_it() -> None:
    """It would be waited for, round after round, by workers that have nothing to do."""
    feed = FairFeed()
    feed.add(at_home("x" * 11))
    assert numbers(feed, "xyxy") == [0, 10, 1]
    assert numbers(feed, "yx" * 9) == list(range(2, 10))


def test_what_a_lost_worker_held_is_done_by_others() -> None:
    """A round would wait for ever for a worker that died."""
    feed, open_ = FairFeed(), False

    def rounds() -> Iterator[list[Job] | None]:
        yield from at_home("xxy")
        while not open_:
            yield None
        yield from at_home("xxy")

    feed.add(rounds())
    feed.close()
    assert numbers(feed, "xyy") == [0, 2]
    feed.lost("x")
    assert numbers(feed, "yy") == [1]
    open_ = True
    assert numbers(feed, "yyyy") == [2, 0, 1]
    assert feed.ended
