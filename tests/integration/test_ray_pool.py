"""The pool: a tile that kills its worker is quarantined, an innocent one beside it is not."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.domain import Grid, Halo, Pass, Reach, Tile
from pipeline.errors import BundleError, ExecutionError, LeaseHeldError
from pipeline.execution.feed import FairFeed
from pipeline.execution.serial import SerialBackend
from pipeline.ports import Job, Record


@dataclass(frozen=True)
class FakeModel:
    key: str = "model"
    unloadable: bool = False

    def load(self) -> str:
        if self.unloadable:
            raise BundleError("the weights are cut short")
        return self.key


@dataclass(frozen=True)
class FakeWork:
    """Kills its process on some tiles, fails on others, and notes nothing."""

    killers: frozenset[int] = frozenset()
    broken: frozenset[int] = frozenset()
    stale: frozenset[int] = frozenset()
    devices_lost: Path | None = None
    seconds: float = 0.02
    model: FakeModel = FakeModel()
    key: str = "work"

    def read(self, tile: Tile) -> int:
        return tile.key.number

    def compute(self, model: str, tile: Tile, data: int) -> str:
        time.sleep(self.seconds)
        if data in self.killers:
            os.kill(os.getpid(), signal.SIGKILL)
        if data in self.broken:
            raise ValueError("not a number\nsecond line")
        if data in self.stale:
            raise LeaseHeldError("another run has taken over")
        if self.devices_lost is not None:
            self._lose_the_device(data)
        return hashlib.sha256(f"{model} {tile.key}".encode()).hexdigest()

    def _lose_the_device(self, data: int) -> None:
        """On tile 5, the first time; then on every tile of the same process."""
        assert self.devices_lost is not None
        mark = self.devices_lost / str(os.getpid())
        if data == 5 and not any(self.devices_lost.iterdir()):
            mark.touch()
        if mark.exists():
            raise RuntimeError("CUDA error: device-side assert triggered")

    def refine(self, tile: Tile, data: str) -> str:
        return data

    def write(self, tile: Tile, result: Any) -> Record:
        return Record(key=tile.key, status="done", digest=str(result))


@pytest.fixture(scope="module", autouse=True)
def _by_value() -> Iterator[None]:
    """Workers cannot import a test module, so its classes travel by value."""
    import ray.cloudpickle

    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)
    yield
    ray.cloudpickle.unregister_pickle_by_value(module)


def tiles_of(case: str, count: int = 40) -> list[Tile]:
    sweep = Pass(
        case=case,
        name="segment",
        grid=Grid(shape=(4, 4 * count), tile=(4, 4), stride=4),
        reach=Reach(stride=4, halo=Halo.uniform(0, ndim=2)),
        crf_halo=Halo.uniform(0, ndim=2),
    )
    return list(sweep.tiles())


def feed_of(**works: FakeWork) -> FairFeed:
    """A closed feed of 40 tiles a case, cases by name."""
    feed = FairFeed()
    for case, work in works.items():
        feed.add([[Job(work=work, tile=tile) for tile in tiles_of(case)]])
    feed.close()
    return feed


def never() -> bool:
    return False


Runner = Callable[[FakeWork], dict[int, Record]]


@pytest.fixture
def run(tmp_path: Path, cluster: None) -> Runner:
    from pipeline.execution.ray_pool import RayBackend

    backend = RayBackend(run_dir=tmp_path, workers=2, threads=1)

    def runner(work: FakeWork) -> dict[int, Record]:
        records = list(backend.run(feed_of(scene=work), stop=never))
        assert len(records) == 40 == len({record.key for record in records})
        return {record.key.number: record for record in records}

    return runner


@pytest.mark.parametrize("seconds", [0.02, 0.0], ids=["slow", "quick"])
def test_a_poison_tile_is_quarantined_and_the_rest_is_done(run: Runner, seconds: float) -> None:
    """A tile that kills every worker would hold the run for ever, or take others along.

    Of quick tiles a worker holds many.
    """
    records = run(FakeWork(killers=frozenset({5, 17}), seconds=seconds))
    failed = {number: record for number, record in records.items() if record.status == "failed"}
    assert set(failed) == {5, 17}
    assert all(record.deaths == 3 and "died" in record.error for record in failed.values())


def test_a_tile_that_raises_is_reported_in_one_line_and_the_rest_is_done(run: Runner) -> None:
    """A bad tile must neither stop the run nor vanish."""
    records = run(FakeWork(broken=frozenset({0, 39})))
    assert {n for n, r in records.items() if r.status == "failed"} == {0, 39}
    assert records[0].error == "ValueError: not a number"


def test_the_pool_leaves_no_file_behind(run: Runner, tmp_path: Path) -> None:
    """Proofs of shared storage are litter once the run is over."""
    run(FakeWork())
    assert not list(tmp_path.glob("nonce*"))


def test_an_actor_that_cannot_load_the_model_is_the_users_error(run: Runner) -> None:
    """A bundle cut short must be one clear line, not a pool that restarts for ever."""
    with pytest.raises(BundleError, match="cut short"):
        run(FakeWork(model=FakeModel(unloadable=True)))


def test_a_worker_of_a_stale_owner_ends_the_run(run: Runner) -> None:
    """A run that lost its lease must stop, not quarantine tile after tile."""
    with pytest.raises(LeaseHeldError, match="taken over"):
        run(FakeWork(stale=frozenset({3})))


def test_a_worker_whose_device_is_lost_takes_no_further_tile(run: Runner, tmp_path: Path) -> None:
    """After one device-side assertion a process fails every tile; all would be quarantined."""
    marks = tmp_path / "lost"
    marks.mkdir()
    records = run(FakeWork(devices_lost=marks))
    assert {record.status for record in records.values()} == {"done"}
    assert len(list(marks.iterdir())) == 1
    assert records[5].deaths == 1


def test_two_cases_share_workers_that_load_each_model_once(tmp_path: Path, cluster: None) -> None:
    """A batch would reload the network for every case, or run one case after another."""
    from pipeline.execution.ray_pool import RayBackend

    works = {
        "scene": FakeWork(model=FakeModel("a"), key="1"),
        "scan": FakeWork(model=FakeModel("b"), key="2"),
        "other": FakeWork(model=FakeModel("a"), key="3"),
    }
    backend = RayBackend(run_dir=tmp_path, workers=2, threads=1)
    records = list(backend.run(feed_of(**works), stop=never))
    oracle = {r.key: r.digest for r in SerialBackend().run(feed_of(**works), stop=never)}
    assert {r.key: r.digest for r in records} == oracle
    assert len(records) == len(oracle) == 120
    assert len({r.worker for r in records}) == 2
    assert {r.loads for r in records} <= {1, 2}
    assert {r.key.case for r in records[:15]} == set(works)


def test_a_case_that_comes_late_is_begun_at_once(tmp_path: Path, cluster: None) -> None:
    """Workers that have nothing to do would sleep while a scan waits, or the run end early."""
    from pipeline.execution.ray_pool import RayBackend

    feed, came = FairFeed(), []

    def later() -> None:
        came.append(time.monotonic())
        feed.add([[Job(work=FakeWork(), tile=tile) for tile in tiles_of("late", 3)]])
        feed.close()

    feed.add([[Job(work=FakeWork(), tile=tile) for tile in tiles_of("first", 3)]])
    seen = []
    for record in RayBackend(run_dir=tmp_path, workers=1, threads=1).run(feed, stop=never):
        seen.append((record.key.case, time.monotonic()))
        if len(seen) == 3:
            threading.Timer(0.5, later).start()
    assert [case for case, _ in seen] == ["first"] * 3 + ["late"] * 3
    assert seen[3][1] - came[0] < 0.9


@dataclass(frozen=True, kw_only=True)
class Draining(FakeWork):
    """The first tile waits for a second worker, the last one for all workers but its own to end."""

    pids: Path

    def compute(self, model: str, tile: Tile, data: int) -> str:
        (self.pids / str(os.getpid())).touch()
        deadline = time.monotonic() + 20.0
        while (data == 0 and self._workers() < 2) or (data == 39 and self._workers() > 1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._workers()} workers live")
            time.sleep(0.05)
        return ""

    def _workers(self) -> int:
        return sum(1 for mark in self.pids.iterdir() if Path("/proc", mark.name).exists())


def test_an_idle_actor_is_let_go_while_the_last_tile_runs(run: Runner, tmp_path: Path) -> None:
    """An actor that has nothing left to do would keep an autoscaler from taking its node back."""
    pids = tmp_path / "pids"
    pids.mkdir()
    records = run(Draining(pids=pids))
    assert [r.error for r in records.values() if r.status == "failed"] == []
    assert len(list(pids.iterdir())) == 2


@dataclass(frozen=True, kw_only=True)
class Crowded(FakeWork):
    """The first on a device is there until all are done but itself and the one read behind it."""

    marks: Path

    def compute(self, model: str, tile: Tile, data: int) -> str:
        deadline, slow = time.monotonic() + 40.0, self._is_first()
        while slow and len(list(self.marks.iterdir())) < 4:
            if time.monotonic() > deadline:
                (self.marks / "late").touch()
                raise TimeoutError("a tile waits behind this one")
            time.sleep(0.05)
        (self.marks / str(data)).touch()
        return ""

    def _is_first(self) -> bool:
        try:
            self.marks.with_name("first").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def test_a_tile_does_not_wait_behind_a_slow_one_while_an_actor_is_idle(
    tmp_path: Path, cluster: None
) -> None:
    """At the end of a run half the devices would idle while tiles wait in the others."""
    from pipeline.execution.ray_pool import RayBackend

    marks, feed = tmp_path / "marks", FairFeed()
    marks.mkdir()
    feed.add([[Job(work=Crowded(marks=marks), tile=tile) for tile in tiles_of("scene", 6)]])
    feed.close()
    records = list(RayBackend(run_dir=tmp_path, workers=2, threads=1).run(feed, stop=never))
    assert [record.status for record in records] == ["done"] * 6
    assert not (marks / "late").exists()


def test_an_actor_that_finds_no_room_is_spoken_of_and_the_others_do_its_work(
    tmp_path: Path,
    cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run on half the nodes asked for would say nothing, or never end."""
    from pipeline.execution import ray_pool

    def warnings() -> list[str]:
        return [r.getMessage() for r in caplog.records if "found room" in r.getMessage()]

    def until_it_warns() -> Iterator[list[Job]]:
        for tile in tiles_of("scene", 2000):
            yield [Job(work=FakeWork(), tile=tile)]
            if len(warnings()) == 1:
                return

    monkeypatch.setattr(ray_pool, "START_TIMEOUT_S", 4.0)
    feed = FairFeed()
    feed.add(until_it_warns())
    feed.close()
    backend = ray_pool.RayBackend(run_dir=tmp_path, workers=3, threads=1)
    records = list(backend.run(feed, stop=never))
    assert len(records) < 2000
    assert {record.status for record in records} == {"done"}
    assert [line.startswith("only 2 workers found room") for line in warnings()] == [True]


def test_a_pool_that_finds_no_room_at_all_says_what_there_is(
    tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker larger than every node would be waited for all night."""
    from pipeline.execution import ray_pool

    monkeypatch.setattr(ray_pool, "START_TIMEOUT_S", 0.5)
    backend = ray_pool.RayBackend(run_dir=tmp_path, workers=None, threads=64)
    with pytest.raises(ExecutionError, match=r"no worker started .* 1 of 64 threads, .*'CPU': 2"):
        list(backend.run(feed_of(scene=FakeWork()), stop=never))


def test_workers_are_as_many_as_fit_where_no_number_is_given(tmp_path: Path, cluster: None) -> None:
    """A cluster would be used by one core, or be asked for what it does not have."""
    from pipeline.execution.ray_pool import RayBackend

    fits = {
        (threads, gpus): RayBackend(
            run_dir=tmp_path, workers=None, threads=threads, gpus_per_worker=gpus
        ).fits()
        for threads, gpus in ((1, 0), (2, 0), (3, 0), (1, 1))
    }
    assert fits == {(1, 0): 2, (2, 0): 1, (3, 0): 1, (1, 1): 1}
    backend = RayBackend(run_dir=tmp_path, workers=None, threads=1)
    records = list(backend.run(feed_of(a=FakeWork(), b=FakeWork(key="b")), stop=never))
    assert len({record.worker for record in records}) == 2


def test_stop_drains_what_is_in_flight_and_starts_nothing_more(
    tmp_path: Path, cluster: None
) -> None:
    """After Ctrl-C the tiles under way are kept; the others wait for the next run."""
    from pipeline.execution.ray_pool import IN_FLIGHT, RayBackend

    told: list[bool] = []
    records = []
    for record in RayBackend(run_dir=tmp_path, workers=2, threads=1).run(
        feed_of(scene=FakeWork()), stop=lambda: bool(told)
    ):
        records.append(record)
        if len(records) == 3:
            told.append(True)
    assert 3 <= len(records) <= 3 + 2 * IN_FLIGHT


def test_other_code_in_a_worker_is_refused(
    tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node with another version would mix two programs' results in one mask."""
    from pipeline.execution import ray_pool

    monkeypatch.setattr(ray_pool, "package_digest", lambda: "another")
    backend = ray_pool.RayBackend(run_dir=tmp_path, workers=1, threads=1)
    with pytest.raises(ExecutionError, match="other code"):
        list(backend.run(feed_of(scene=FakeWork()), stop=never))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "rubbish", "ray://head:10001"])
def test_a_cluster_that_cannot_be_joined_is_refused_at_once(address: str) -> None:
    """Ray tries for minutes and ends the process; its client does not share the run directory."""
    from pipeline.execution.ray_cluster import _connect

    with pytest.raises(ExecutionError, match=address):
        _connect(address)


def test_a_cluster_that_was_killed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address stays in Ray's folder, where ``auto`` finds it: a tick would hang for minutes."""
    from ray._private import services

    from pipeline.execution.ray_cluster import _connect

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_gcs_addresses", frozenset)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: "127.0.0.1:1")
    with pytest.raises(ExecutionError, match=r"cluster auto asked for: .*refused"):
        _connect("auto")


def test_the_serial_backend_treats_a_bad_tile_as_the_pool_does() -> None:
    """The oracle must agree with the pool on failures, too."""
    feed = feed_of(scene=FakeWork(broken=frozenset({7})))
    records = list(SerialBackend().run(feed, stop=never))
    assert [r.key.number for r in records if r.status == "failed"] == [7]
    assert len(records) == 40
