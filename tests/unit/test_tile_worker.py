"""One worker: its stages overlap, keep order, and end."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import Any

import pytest

from pipeline.domain import Grid, Halo, Pass, Reach, Tile
from pipeline.execution.worker import Stage, TileWorker
from pipeline.ports import Record


class Watched:
    """Notes in which thread each stage ran."""

    threads, loads = 1, 1

    def __init__(self) -> None:
        self.seen: dict[str, set[str]] = {"read": set(), "compute": set(), "write": set()}

    def open(self) -> Watched:
        return self

    def _note(self, stage: str) -> None:
        self.seen[stage].add(threading.current_thread().name)

    def read(self, tile: Tile) -> int:
        self._note("read")
        return tile.key.number

    def compute(self, tile: Tile, data: int) -> int:
        self._note("compute")
        return data

    def write(self, tile: Tile, result: Any) -> Record:
        self._note("write")
        return Record(key=tile.key, status="done", digest=str(result))


def test_each_stage_stays_in_one_thread_whoever_asks() -> None:
    """A device whose tiles wander over threads holds its working memory several times over."""
    work = Watched()
    sweep = Pass(
        case="scene",
        name="segment",
        grid=Grid(shape=(32,), tile=(4,), stride=4),
        reach=Reach(stride=4, halo=Halo.uniform(0, ndim=1)),
        crf_halo=Halo.uniform(0, ndim=1),
    )
    records: list[Record] = []
    with closing(TileWorker(work)) as worker:
        askers = [
            threading.Thread(target=lambda tile=tile: records.append(worker.run(tile)))
            for tile in sweep.tiles()
        ]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
    assert sorted(record.digest for record in records) == sorted(str(n) for n in range(8))
    assert work.seen == {"read": {"read"}, "compute": {"device"}, "write": {"write"}}
    assert all(set(record.seconds) == {"read", "compute", "write"} for record in records)


def test_a_stage_raises_where_the_call_was_made_and_goes_on() -> None:
    """An error that stayed in the thread would leave the caller waiting for ever."""
    with closing(Stage("x")) as stage:
        with pytest.raises(ZeroDivisionError):
            stage.run(lambda: 1 / 0)
        assert stage.run(lambda: 5)[0] == 5


def test_a_closed_stage_ends_its_thread() -> None:
    """A batch of a thousand scenes must not leave three thousand threads."""
    stage = Stage("short-lived")
    assert any(thread.name == "short-lived" for thread in threading.enumerate())
    stage.close()
    for thread in threading.enumerate():
        if thread.name == "short-lived":
            thread.join(timeout=5)
    assert not any(thread.name == "short-lived" for thread in threading.enumerate())
