"""Two passes over an image: what may run when, and what becomes of the second without the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from pipeline.domain import Grid, Halo, Pass, Reach, TileKey, TilePlan
from pipeline.execution.feed import FairFeed
from pipeline.execution.queue import TileQueue
from pipeline.ports import Feed, Job, Record
from pipeline.segment_image import ImageTiles, segment_images

Judge = Callable[[Job], Record]


class MemoryLedger:
    """What was noted, in order."""

    def __init__(self, *known: Record) -> None:
        self.lines = list(known)

    def records(self) -> dict[TileKey, Record]:
        return {record.key: record for record in self.lines}

    def append(self, record: Record) -> None:
        self.lines.append(record)


class ManyHands:
    """A backend that holds ``hands`` tiles and ends the one that it took last: the worst order."""

    def __init__(self, judge: Judge, *, hands: int) -> None:
        self._judge, self._hands = judge, hands
        self.taken: list[TileKey] = []

    def run(self, feed: Feed, *, stop: Callable[[], bool]) -> Iterator[Record]:
        queue, held = TileQueue(feed), list[Job]()
        while True:
            while len(held) < self._hands and (job := queue.take("w", alone=True)) is not None:
                held.append(job)
                self.taken.append(job.tile.key)
            if not held and queue.empty:
                return
            job = held.pop()
            record = queue.settle(job, self._judge(job))
            if record is not None:
                yield record


def plan_of(case: str, *, passes: int = 2) -> TilePlan:
    """Twelve tiles a pass."""
    halo, none = Halo.uniform(4, ndim=2), Halo.uniform(0, ndim=2)
    sweep = Pass(
        case=case,
        name="segment",
        grid=Grid(shape=(12, 16), tile=(4, 4), stride=4),
        reach=Reach(stride=4, halo=halo, pooled=halo if passes == 2 else None),
        crf_halo=none,
    )
    found = sweep.with_context()
    assert [one.name for one in found] == ["context", "segment"][-passes:]
    return TilePlan(passes=found, fingerprint="", peak_bytes=0, store_bytes=0)


def image_of(plan: TilePlan, ledger: MemoryLedger) -> ImageTiles:
    works = {sweep.name: None for sweep in plan.passes}
    return ImageTiles(plan, works, ledger=ledger, observers=[])  # type: ignore[arg-type]


def run(judge: Judge, *, hands: int, **images: ImageTiles) -> tuple[list[TileKey], list[str]]:
    """Tiles in the order they were handed out, and images in the order they ended."""
    feed, ended, backend = FairFeed(), list[str](), ManyHands(judge, hands=hands)
    for image in images.values():
        feed.add(image.jobs())
    feed.close()
    segment_images(feed, images, backend=backend, ended=ended.append, stop=lambda: False)
    return backend.taken, ended


def done(job: Job) -> Record:
    return Record(key=job.tile.key, status="done")


def test_the_second_pass_begins_when_the_first_has_ended() -> None:
    """A tile would be segmented with the mean of half a scene."""
    ledger = MemoryLedger()
    _, ended = run(done, hands=5, a=image_of(plan_of("a"), ledger))
    assert [record.key.stage for record in ledger.lines] == ["context"] * 12 + ["segment"] * 12
    assert ended == ["a"]


def test_a_tile_that_is_tried_again_holds_the_second_pass_up() -> None:
    """A first pass whose failed tile waits for its turn would count as ended."""
    tries = 0

    def second_try(job: Job) -> Record:
        nonlocal tries
        if job.tile.key != TileKey("a", "context", 3):
            return done(job)
        tries += 1
        return done(job) if tries == 2 else Record(key=job.tile.key, status="failed", error="x")

    ledger = MemoryLedger()
    taken, _ = run(second_try, hands=3, a=image_of(plan_of("a"), ledger))
    assert tries == 2
    assert [key.stage for key in taken] == ["context"] * 13 + ["segment"] * 12


def test_another_image_goes_on_while_one_waits_between_its_passes() -> None:
    """A pool would stand idle at the end of every first pass of an archive."""
    ledger = MemoryLedger()
    one, two = image_of(plan_of("a"), ledger), image_of(plan_of("b", passes=1), ledger)
    taken, ended = run(done, hands=20, a=one, b=two)
    assert {key.case for key in taken[:20]} == {"a", "b"}
    assert sorted(ended) == ["a", "b"]
    assert len(ledger.lines) == 36


def test_without_the_first_pass_the_second_fails_and_says_why() -> None:
    """A wrong mean, a run that never ends, or one that says nothing of the tile at fault."""

    def bad(job: Job) -> Record:
        failed = job.tile.key == TileKey("a", "context", 7)
        return Record(key=job.tile.key, status="failed", error="no disk") if failed else done(job)

    ledger = MemoryLedger()
    image = image_of(plan_of("a"), ledger)
    taken, ended = run(bad, hands=4, a=image, b=image_of(plan_of("b"), ledger))
    assert ("a", "segment") not in {(key.case, key.stage) for key in taken}
    assert sorted(ended) == ["a", "b"]
    segment = image.outcome.of(plan_of("a").passes[1])
    assert len(segment.failed) == 12
    assert {r.error for r in segment.failed} == {"context pass: tile 7 failed: no disk"}
    again, _ = run(done, hands=4, a=image_of(plan_of("a"), ledger))
    assert again[0] == TileKey("a", "context", 7)
    assert [key.stage for key in again] == ["context"] + ["segment"] * 12


def test_what_the_ledger_has_of_both_passes_is_not_done_again() -> None:
    """A run killed in its second pass would begin with the first."""
    plan = plan_of("a")
    keys = [tile.key for tile in plan.tiles()]
    for cut in (5, 12, 20):
        ledger = MemoryLedger(*(Record(key=key, status="done") for key in keys[:cut]))
        taken, ended = run(done, hands=2, a=image_of(plan, ledger))
        assert taken == keys[cut:]
        assert ended == ["a"]


def test_a_tile_is_at_home_where_the_pass_before_kept_it() -> None:
    """What was kept would be of no use; or a process that has ended would be waited for."""
    plan, seen = plan_of("a"), dict[TileKey, str]()

    def judge(job: Job) -> Record:
        seen[job.tile.key] = job.home
        return Record(key=job.tile.key, status="done", worker="w", kept=job.tile.key.number % 2 > 0)

    ledger = MemoryLedger()
    run(judge, hands=2, a=image_of(plan, ledger))
    assert {key.number for key, home in seen.items() if home == "w"} == {1, 3, 5, 7, 9, 11}
    assert {key.stage for key, home in seen.items() if home} == {"segment"}
    seen.clear()
    first = MemoryLedger(*(r for r in ledger.lines if r.key.stage == "context"))
    run(judge, hands=2, a=image_of(plan, first))
    assert {*seen.values()} == {""}


def test_a_pass_that_bears_gaps_lacks_the_tile_alone_and_so_do_those_after_it() -> None:
    """One bad tile would end all of a scene; or be done as if what it needs were there."""
    first, second = plan_of("a").passes
    assert isinstance(second, Pass)
    second = replace(second, bears_gaps=True)
    third = replace(second, name="third", after="segment", bears_gaps=False)
    plan = TilePlan(passes=(first, second, third), fingerprint="", peak_bytes=0, store_bytes=0)

    def bad(job: Job) -> Record:
        key, gone = job.tile.key, {TileKey("a", "context", 7), TileKey("a", "context", 9)}
        return Record(key=key, status="failed", error="no disk") if key in gone else done(job)

    image = image_of(plan, MemoryLedger())
    _, ended = run(bad, hands=4, a=image)
    assert ended == ["a"]
    failed = {r.key: r.error for r in image.outcome.failed}
    assert {(key.stage, key.number) for key in failed} == {
        (stage, number) for stage in ("context", "segment", "third") for number in (7, 9)
    }
    assert failed[TileKey("a", "third", 9)] == "context pass: tile 9 failed: no disk"
