"""The pool: a tile that kills its worker is quarantined, an innocent one beside it is not."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.domain import Grid, Halo, Pass, Reach, Tile
from pipeline.errors import BundleError, ExecutionError, LeaseHeldError
from pipeline.execution.serial import SerialBackend
from pipeline.ports import Record


@dataclass(frozen=True)
class FakeWork:
    """Kills its process on some tiles, fails on others, and notes nothing."""

    killers: frozenset[int] = frozenset()
    broken: frozenset[int] = frozenset()
    stale: frozenset[int] = frozenset()
    unloadable: bool = False
    threads: int = 1

    def open(self) -> FakeWork:
        if self.unloadable:
            raise BundleError("the weights are cut short")
        return self

    @property
    def loads(self) -> int:
        return 1

    def read(self, tile: Tile) -> int:
        return tile.key.number

    def compute(self, tile: Tile, data: int) -> int:
        time.sleep(0.02)
        if data in self.killers:
            os.kill(os.getpid(), signal.SIGKILL)
        if data in self.broken:
            raise ValueError("not a number\nsecond line")
        if data in self.stale:
            raise LeaseHeldError("another run has taken over")
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


@pytest.fixture
def tiles() -> list[Tile]:
    sweep = Pass(
        case="scene",
        name="segment",
        grid=Grid(shape=(16, 40), tile=(4, 4), stride=4),
        reach=Reach(stride=4, halo=Halo.uniform(0, ndim=2)),
        crf_halo=Halo.uniform(0, ndim=2),
    )
    return list(sweep.tiles())


def never() -> bool:
    return False


Runner = Callable[[FakeWork], dict[int, Record]]


@pytest.fixture
def run(tmp_path: Path, tiles: list[Tile], cluster: None) -> Runner:
    from pipeline.execution.ray_pool import RayBackend

    backend = RayBackend(run_dir=tmp_path, workers=2)

    def runner(work: FakeWork) -> dict[int, Record]:
        records = list(backend.run(work, tiles, stop=never))
        assert len(records) == len(tiles) == len({record.key for record in records})
        return {record.key.number: record for record in records}

    return runner


def test_a_poison_tile_is_quarantined_and_the_rest_is_done(run: Runner) -> None:
    """A tile that kills every worker would hold the run for ever, or take others along."""
    records = run(FakeWork(killers=frozenset({5, 17})))
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
        run(FakeWork(unloadable=True))


def test_a_worker_of_a_stale_owner_ends_the_run(run: Runner) -> None:
    """A run that lost its lease must stop, not quarantine tile after tile."""
    with pytest.raises(LeaseHeldError, match="taken over"):
        run(FakeWork(stale=frozenset({3})))


def test_stop_drains_what_is_in_flight_and_starts_nothing_more(
    tmp_path: Path, tiles: list[Tile], cluster: None
) -> None:
    """After Ctrl-C the tiles under way are kept; the others wait for the next run."""
    from pipeline.execution.ray_pool import IN_FLIGHT, RayBackend

    told: list[bool] = []
    records = []
    for record in RayBackend(run_dir=tmp_path, workers=2).run(
        FakeWork(), tiles, stop=lambda: bool(told)
    ):
        records.append(record)
        if len(records) == 3:
            told.append(True)
    assert 3 <= len(records) <= 3 + 2 * IN_FLIGHT


def test_other_code_in_a_worker_is_refused(
    tmp_path: Path, tiles: list[Tile], cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node with another version would mix two programs' results in one mask."""
    from pipeline.execution import ray_pool

    monkeypatch.setattr(ray_pool, "package_digest", lambda: "another")
    with pytest.raises(ExecutionError, match="other code"):
        list(ray_pool.RayBackend(run_dir=tmp_path, workers=1).run(FakeWork(), tiles, stop=never))


def test_client_mode_is_refused(tmp_path: Path) -> None:
    """A Ray client does not share the run directory with its actors."""
    from pipeline.execution.ray_pool import RayBackend

    with pytest.raises(ExecutionError, match="ray://"):
        RayBackend(run_dir=tmp_path, workers=1, address="ray://head:10001")


def test_the_serial_backend_treats_a_bad_tile_as_the_pool_does(tiles: list[Tile]) -> None:
    """The oracle must agree with the pool on failures, too."""
    records = list(SerialBackend().run(FakeWork(broken=frozenset({7})), tiles, stop=never))
    assert [r.key.number for r in records if r.status == "failed"] == [7]
    assert len(records) == len(tiles)
