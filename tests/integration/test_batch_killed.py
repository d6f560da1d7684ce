"""A night over an archive: whatever is killed on the way, each case is computed once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scenes import texture, write_raster

from adapters.ledger_file import CaseLedgerFile, LedgerFile
from pipeline.domain import CaseRecord
from pipeline.ports import Record
from workflows.batching import batch
from workflows.config import SegmentOptions
from workflows.run_dir import file_digest

pytestmark = pytest.mark.chaos
CASES = 12
TILES = 9


class Batch:
    """``terravox batch`` over one folder in processes of their own, two actors each."""

    def __init__(self, folder: Path, bundle: Path, output: Path) -> None:
        self.run, self.folder = Path(f"{output}.run"), output.parent
        self.line = [
            str(Path(sys.executable).with_name("terravox")), "batch", str(folder),
            "-o", str(output),
            "--model", os.path.relpath(bundle, self.folder), "--tile", "64",
            "--precision", "fp32", "--workers", "2", "--tracking-uri", "none",
        ]  # fmt: skip
        self.env = os.environ | {"HOME": str(output.parent)}

    def start(self) -> subprocess.Popen[bytes]:
        # The model's path is relative, and the pool enters the run directory.
        return subprocess.Popen(self.line, cwd=self.folder, env=self.env, stderr=subprocess.PIPE)

    def cases(self) -> list[CaseRecord]:
        return list(CaseLedgerFile(self.run / "ledger", owner="t").history())

    def tiles(self) -> list[Record]:
        ledgers = sorted((self.run / "cases").glob("*/ledger"))
        return [r for ledger in ledgers for r in LedgerFile(ledger, owner="t").history()]

    def until(self, process: subprocess.Popen[bytes], enough: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not enough():
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            assert time.monotonic() < deadline, "the batch made no progress"
            time.sleep(0.02)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve scenes of nine tiles, and one that is cut off."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(CASES):
        image = np.stack([texture((150, 190), seed=10 * number + band) for band in range(3)])
        path = write_raster(folder / f"s{number:02d}.tif", image)
    (folder / "cut.tif").write_bytes(path.read_bytes()[:-60_000])
    return folder


def test_a_batch_killed_three_times_computes_each_case_once(
    folder: Path, tmp_path: Path, slim: Path
) -> None:
    """Driver, actor, driver: what the ledgers call done stays done, and the masks are the same."""
    night = Batch(folder, slim, tmp_path / "out")
    first = night.start()
    night.until(first, lambda: len(night.tiles()) >= 20)
    first.send_signal(signal.SIGKILL)
    first.wait()
    dead = {record.worker for record in night.tiles()}
    second = night.start()
    night.until(second, lambda: {record.worker for record in night.tiles()} > dead)
    victim = next(record.worker for record in night.tiles() if record.worker not in dead)
    os.kill(int(victim.split(":")[1]), signal.SIGKILL)
    night.until(second, lambda: len(night.tiles()) >= 60)
    second.send_signal(signal.SIGKILL)
    second.wait()
    assert sum(c.state == "done" for c in night.cases()) < CASES
    third = night.start()
    _, text = third.communicate(timeout=300)
    assert third.returncode == 3, text.decode()
    tiles = [record.key for record in night.tiles() if record.status == "done"]
    assert len(tiles) == len(set(tiles)), "a tile was computed twice"
    done = [record.case for record in night.cases() if record.state == "done"]
    assert sorted(done) == [f"s{n:02d}" for n in range(CASES)], "a case was finished twice"
    last = {record.case: record for record in night.cases()}
    assert last["cut"].state == "failed"
    asked = SegmentOptions(backend="serial", tracking_uri="none", precision="fp32", tile=64)
    batch([folder], tmp_path / "calm", models=[slim], options=asked)
    for name in done:
        calm = tmp_path / f"calm/{name}.tif"
        assert file_digest(tmp_path / f"out/{name}.tif") == file_digest(calm)
