"""One worker: its stages overlap, keep order, and end; models and cases are kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pytest

from pipeline.domain import Region, Tile, TileKey
from pipeline.errors import BundleError, ExecutionError, LeaseHeldError, StoreError
from pipeline.execution.feed import FairFeed
from pipeline.execution.serial import SerialBackend
from pipeline.execution.worker import KEPT_CASES, STAGES, TileWorker
from pipeline.ports import Job, Record


@dataclass
class CountedModel:
    """Counts how often it was loaded, and where."""

    key: str = "model"
    error: Exception | None = None
    loaded_in: list[str] = field(default_factory=list)

    def load(self) -> str:
        self.loaded_in.append(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        return self.key


@dataclass
class Watched:
    """Notes in which thread each stage ran, and with which model."""

    model: CountedModel = field(default_factory=CountedModel)
    key: str = "work"
    error: Exception | None = None
    seen: dict[str, set[str]] = field(default_factory=lambda: {stage: set() for stage in STAGES})
    models: list[str] = field(default_factory=list)
    reads: int = 0

    def _note(self, stage: str) -> None:
        self.seen[stage].add(threading.current_thread().name)

    def read(self, tile: Tile) -> int:
        self._note("read")
        self.reads += 1
        return tile.key.number

    def compute(self, model: str, tile: Tile, data: int) -> int:
        self._note("compute")
        self.models.append(model)
        if self.error is not None:
            raise self.error
        return data

    def refine(self, tile: Tile, data: int) -> int:
        self._note("refine")
        return data

    def write(self, tile: Tile, result: Any) -> Record:
        self._note("write")
        return Record(key=tile.key, status="done", digest=str(result))


def job(work: Any, number: int = 0, *, case: str = "scene") -> Job:
    box = Region.whole((4,))
    return Job(
        work=work, tile=Tile(key=TileKey(case, "segment", number), core=box, scored=box, read=box)
    )


@pytest.fixture
def worker() -> Iterator[TileWorker]:
    with closing(TileWorker()) as worker:
        yield worker


def test_each_stage_stays_in_one_thread_whoever_asks(worker: TileWorker) -> None:
    """A device whose tiles wander over threads holds its working memory several times over."""
    work = Watched()
    records: list[Record] = []
    askers = [
        threading.Thread(target=lambda n=n: records.append(worker.run(job(work, n))))
        for n in range(8)
    ]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert sorted(record.digest for record in records) == sorted(str(n) for n in range(8))
    assert work.seen == {stage: {stage} for stage in STAGES}
    assert work.model.loaded_in == ["compute"]
    assert all(tuple(record.seconds) == STAGES for record in records)


def test_cases_with_equal_models_share_one_that_is_loaded_once(worker: TileWorker) -> None:
    """A thousand small scans would load the network a thousand times."""
    recipes = [CountedModel(key) for key in ("a", "b", "a", "a", "b")]
    works = [Watched(model=recipe, key=str(n)) for n, recipe in enumerate(recipes)]
    loads = [worker.run(job(work, case=str(n))).loads for n, work in enumerate(works)]
    assert loads == [1, 2, 2, 2, 2]
    assert [len(recipe.loaded_in) for recipe in recipes] == [1, 1, 0, 0, 0]
    assert [work.models for work in works] == [["a"], ["b"], ["a"], ["a"], ["b"]]


def test_a_worker_keeps_the_instance_of_a_case_and_not_of_all_cases(worker: TileWorker) -> None:
    """Each tile would open its files anew, or an archive would hold a thousand open."""
    first, equal = Watched(), Watched()
    worker.run(job(first))
    worker.run(job(equal))
    assert (first.reads, equal.reads) == (2, 0)
    for n in range(KEPT_CASES):
        worker.run(job(Watched(key=f"other {n}"), case=str(n)))
    worker.run(job(equal))
    assert equal.reads == 1


def test_equal_work_of_two_cases_is_not_mixed_up(worker: TileWorker) -> None:
    """Two copies of a scan have equal plans; the mask of one would go to the other's place."""
    one, copy = Watched(), Watched()
    worker.run(job(one, case="scan"))
    worker.run(job(copy, case="copy of scan"))
    assert (one.reads, copy.reads) == (1, 1)


def both(worker: TileWorker, work: Watched) -> list[Record]:
    """Two tiles at a time."""
    with ThreadPoolExecutor(2) as askers:
        return list(askers.map(lambda n: worker.run(job(work, n)), range(2)))


@dataclass
class Overlapping(Watched):
    """Its first tile computes until the second tile was read."""

    second_read: threading.Event = field(default_factory=threading.Event)

    def read(self, tile: Tile) -> int:
        if tile.key.number == 1:
            self.second_read.set()
        return tile.key.number

    def compute(self, model: str, tile: Tile, data: int) -> int:
        if tile.key.number == 0 and not self.second_read.wait(10.0):
            raise TimeoutError("the second tile waits for the device before it is read")
        return data


def test_the_next_tile_is_read_while_this_one_is_on_the_device(worker: TileWorker) -> None:
    """The device would idle during every read: the pool's whole point."""
    assert [r.error for r in both(worker, Overlapping())] == ["", ""]


@dataclass
class Refining(Watched):
    """The CRF of its first tile ends once the second tile is on the device."""

    second_computed: threading.Event = field(default_factory=threading.Event)

    def compute(self, model: str, tile: Tile, data: int) -> int:
        if tile.key.number == 1:
            self.second_computed.set()
        return data

    def refine(self, tile: Tile, data: int) -> int:
        if tile.key.number == 0 and not self.second_computed.wait(10.0):
            raise TimeoutError("the device waits for the CRF of the tile before")
        return data


def test_the_next_tile_is_on_the_device_while_this_one_is_refined(worker: TileWorker) -> None:
    """A device would idle through every CRF, which takes as long as a small network."""
    assert [r.error for r in both(worker, Refining())] == ["", ""]


def test_a_model_that_cannot_be_loaded_is_not_a_bad_tile(worker: TileWorker) -> None:
    """Every tile of every case would be tried twice and quarantined for a broken bundle."""
    broken = Watched(model=CountedModel(error=BundleError("the weights are cut short")))
    for _ in range(2):
        with pytest.raises(BundleError, match="cut short"):
            worker.run(job(broken))


def test_a_tile_that_raises_is_a_failed_record_of_one_line(worker: TileWorker) -> None:
    """A bad tile must neither end the run nor vanish; the worker goes on."""
    record = worker.run(job(Watched(error=ValueError("not a number\nsecond line"))))
    assert (record.status, record.error) == ("failed", "ValueError: not a number")
    assert worker.run(job(Watched(key="good"))).status == "done"


@pytest.mark.parametrize(
    "error", [LeaseHeldError("taken over"), StoreError("full")], ids=["lease", "disk"]
)
def test_what_no_other_tile_would_survive_is_raised(worker: TileWorker, error: Exception) -> None:
    """A run without lease or disk would fail tile after tile instead of stopping."""
    if isinstance(error, StoreError):
        error.__cause__ = OSError(28, "No space left on device")
    with pytest.raises(type(error)):
        worker.run(job(Watched(error=error)))


def test_a_lost_device_is_not_the_tiles_fault(worker: TileWorker) -> None:
    """After one device-side assertion every later tile of the process would be quarantined."""
    lost = RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might")
    with pytest.raises(ExecutionError, match=r"device of .* is lost .*device-side assert trig"):
        worker.run(job(Watched(error=lost)))
    full = worker.run(job(Watched(key="b", error=RuntimeError("CUDA out of memory. Tried to"))))
    assert full.status == "failed"


def test_the_serial_backend_waits_for_a_case_that_comes_late() -> None:
    """Between two cases of a batch the run would end."""
    feed, work = FairFeed(), Watched()
    feed.add([[job(work, 0)]])

    def later() -> None:
        feed.add([[job(work, 1)]])
        feed.close()

    records = []
    for record in SerialBackend().run(feed, stop=lambda: False):
        records.append(record.key.number)
        if len(records) == 1:
            threading.Timer(0.05, later).start()
    assert records == [0, 1]


@dataclass
class SlowModel(CountedModel):
    def load(self) -> str:
        time.sleep(0.05)
        return super().load()


def test_loading_the_model_is_a_wait_of_the_device_and_not_its_work(worker: TileWorker) -> None:
    """The first tile would look slow, and a device that loads models all day look busy."""
    first, second = (worker.run(job(Watched(model=SlowModel()), n)) for n in range(2))
    assert first.waits["compute"]["model"] >= 0.05 > first.seconds["compute"]
    assert "model" not in second.waits.get("compute", {})
