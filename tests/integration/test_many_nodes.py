"""A cluster whose nodes come and go while a run goes on; run as a script, this is the run."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from raylets import CPUS, Raylets

from pipeline.domain import Region, Tile, TileKey
from pipeline.execution.feed import FairFeed
from pipeline.execution.serial import SerialBackend
from pipeline.ports import Job, Record

CASES, TILES = ("scene", "scan"), 80


@dataclass(frozen=True)
class Constant:
    key: str = "model"

    def load(self) -> str:
        return "weights"


@dataclass(frozen=True)
class Hashes:
    """Takes its time, so that nodes can come and go."""

    key: str
    seconds: float
    model: Constant = Constant()

    def read(self, tile: Tile) -> bytes:
        return repr(tile).encode()

    def compute(self, model: str, tile: Tile, data: bytes) -> str:
        time.sleep(self.seconds)
        return hashlib.sha256(model.encode() + data).hexdigest()

    def refine(self, tile: Tile, data: str) -> str:
        return data

    def write(self, tile: Tile, result: Any) -> Record:
        return Record(key=tile.key, status="done", digest=str(result))


def feed(*, seconds: float) -> FairFeed:
    feed, box = FairFeed(), Region.whole((4, 4))
    for case in CASES:
        work = Hashes(key=case, seconds=seconds)
        keys = [TileKey(case, "segment", n) for n in range(TILES)]
        tiles = [Tile(key=key, core=box, scored=box, read=box) for key in keys]
        feed.add([[Job(work=work, tile=tile) for tile in tiles]])
    feed.close()
    return feed


def main(address: str, run_dir: str, workers: str, seconds: str) -> None:
    """Run on the cluster at ``address``; a line of JSON per record, and nothing else."""
    from pipeline.execution.ray_pool import RayBackend

    backend = RayBackend(
        run_dir=Path(run_dir), workers=int(workers) or None, threads=1, address=address
    )
    for record in backend.run(feed(seconds=float(seconds)), stop=lambda: False):
        line = [*record.key, record.digest, record.worker, record.deaths]
        print(json.dumps(line), flush=True)


@dataclass(frozen=True)
class Noted:
    """What the run said of a tile."""

    case: str
    stage: str
    number: int
    digest: str
    worker: str
    deaths: int


@pytest.fixture(scope="module")
def raylets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Raylets]:
    with Raylets(tmp_path_factory.mktemp("home")) as raylets:
        yield raylets


@pytest.fixture(scope="module")
def oracle() -> dict[tuple[str, int], str]:
    records = SerialBackend().run(feed(seconds=0.0), stop=lambda: False)
    return {(r.key.case, r.key.number): r.digest for r in records}


Change = Callable[[list[Noted]], bool]
"""Is shown the records so far after each one; does something to the cluster once, then is true."""


def run(
    raylets: Raylets, run_dir: Path, change: Change, *, workers: int, seconds: float
) -> list[Noted]:
    """Every record of a run in the order of arrival; 0 workers are as many as fit."""
    noted: list[Noted] = []
    changed = False
    with (run_dir / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, raylets.address, run_dir, str(workers), str(seconds)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=raylets.env,
        )
        for line in process.stdout or ():
            noted.append(Noted(*json.loads(line)))
            changed = changed or change(noted)
    assert process.wait() == 0, (run_dir / "log").read_text()
    assert changed
    return noted


@pytest.mark.chaos
def test_a_node_lost_in_mid_run_changes_nothing(
    raylets: Raylets, tmp_path: Path, oracle: dict[tuple[str, int], str]
) -> None:
    """A power cut in one rack would lose tiles, note some twice, or hold the run for ever.

    The actors that are to replace the lost ones never find room; Ray's own words about the node
    would be lines that are no records.
    """

    def lose_a_node(noted: list[Noted]) -> bool:
        if len({n.worker for n in noted}) <= CPUS:
            return False
        raylets.remove(raylets.nodes[0])
        return True

    noted = run(raylets, tmp_path, lose_a_node, workers=2 * CPUS, seconds=0.1)
    assert {(n.case, n.number): n.digest for n in noted} == oracle
    assert len(noted) == len(oracle) == len(CASES) * TILES
    assert sum(n.deaths for n in noted) > 0
    assert len({n.worker for n in noted[-10:]}) <= CPUS


@pytest.mark.chaos
def test_a_node_that_joins_in_mid_run_gets_work(
    raylets: Raylets, tmp_path: Path, oracle: dict[tuple[str, int], str]
) -> None:
    """A machine that comes at midnight would stand idle until the next run."""
    while len(raylets.nodes) > 1:
        raylets.remove(raylets.nodes[0])
    noted = run(raylets, tmp_path, lambda _: bool(raylets.add()), workers=0, seconds=0.15)
    assert {(n.case, n.number): n.digest for n in noted} == oracle
    assert len(noted) == len(oracle) == len(CASES) * TILES
    assert sum(n.deaths for n in noted) == 0
    assert len({n.worker for n in noted}) > CPUS


if __name__ == "__main__":
    main(*sys.argv[1:])
