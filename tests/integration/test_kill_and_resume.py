"""Promise 3: any process may be killed; the same command finishes the run with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from adapters.ledger_file import LedgerFile
from pipeline.ports import Record
from workflows.config import SegmentOptions
from workflows.run_dir import file_digest
from workflows.segmenting import segment

pytestmark = pytest.mark.chaos
TILE = 64
TOTAL = 11 * 15 + 2
"""Tiles, and the samples of the certificate."""


class Command:
    """``terravox segment`` in a process of its own, from a directory with a decoy ``pipeline/``."""

    def __init__(self, scene: Path, bundle: Path, output: Path) -> None:
        self.output = output
        decoy = output.parent / "pipeline"
        decoy.mkdir(exist_ok=True)
        (decoy / "__init__.py").write_text("raise RuntimeError('the decoy was imported')\n")
        script = Path(sys.executable).with_name("terravox")
        self.line = [
            str(script), "segment", str(scene), "-o", output.name, "--model", str(bundle),
            "--tile", str(TILE), "--precision", "fp32", "--crf", "off", "--workers", "2",
            "--tracking-uri", "none",
        ]  # fmt: skip
        self.env = os.environ | {"HOME": str(output.parent)}

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.line, cwd=self.output.parent, env=self.env, stderr=subprocess.PIPE
        )

    def history(self) -> list[Record]:
        return list(LedgerFile(Path(f"{self.output}.run/ledger"), owner="test").history())

    def until(
        self, process: subprocess.Popen[bytes], enough: Callable[[list[Record]], bool]
    ) -> list[Record]:
        """The ledger once there is enough in it; at least three tiles are still to go."""
        deadline = time.monotonic() + 120
        while not enough(history := self.history()):
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            assert time.monotonic() < deadline, "the run made no progress"
            time.sleep(0.02)
        assert TOTAL - len(history) >= 3
        return history


@pytest.fixture
def command(scene: Path, slim: Path, tmp_path: Path) -> Command:
    return Command(scene, slim, tmp_path / "killed.tif")


@pytest.fixture(scope="module")
def wanted(scene: Path, slim: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of an undisturbed serial run of the same plan."""
    output = tmp_path_factory.mktemp("whole") / "whole.tif"
    asked = SegmentOptions(
        backend="serial", tracking_uri="none", precision="fp32", crf="off", tile=TILE
    )
    segment(scene, output, model=slim, options=asked)
    return file_digest(output)


def three(history: list[Record]) -> bool:
    return len(history) >= 3


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_killed_driver_is_finished_by_the_same_command(command: Command, wanted: str) -> None:
    """The rerun may redo what was in flight, and nothing that the ledger calls done."""
    first = command.start()
    command.until(first, three)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not command.output.exists()
    before = command.history()
    actors = {int(record.worker.split(":")[1]) for record in before}
    second = command.start()
    _, text = second.communicate(timeout=300)
    assert second.returncode == 0, text.decode()
    assert "resuming" in text.decode()
    assert file_digest(command.output) == wanted
    history = command.history()
    assert len(history) == TOTAL
    assert len({record.key for record in history}) == TOTAL
    wait_for(lambda: all(gone(pid) for pid in actors))


def test_a_killed_actor_is_replaced_within_the_run(command: Command, wanted: str) -> None:
    """Its tiles go back into the queue; the run neither fails nor hangs."""
    process = command.start()
    victim = command.until(process, three)[-1].worker
    os.kill(int(victim.split(":")[1]), signal.SIGKILL)
    _, text = process.communicate(timeout=300)
    assert process.returncode == 0, text.decode()
    assert "go back into the queue" in text.decode()
    assert file_digest(command.output) == wanted
    history = command.history()
    assert len(history) == len({record.key for record in history}) == TOTAL
    assert len({record.worker for record in history}) >= 2


def test_ctrl_c_drains_exits_130_and_the_rerun_resumes(command: Command, wanted: str) -> None:
    """Work that was under way when a person stopped the run is kept."""
    first = command.start()
    command.until(first, three)
    first.send_signal(signal.SIGINT)
    _, text = first.communicate(timeout=120)
    assert first.returncode == 130, text.decode()
    kept = len(command.history())
    assert 3 <= kept < TOTAL
    assert not command.output.exists()
    second = command.start()
    _, text = second.communicate(timeout=300)
    assert second.returncode == 0, text.decode()
    assert file_digest(command.output) == wanted
    assert len(command.history()) == TOTAL


def test_ctrl_c_before_the_first_tile_starts_no_workers(
    scene: Path, slim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person who stops a run that is still being planned would wait for a cluster to start."""
    monkeypatch.delattr("workflows.segmenting.make_backend")
    asked = SegmentOptions(tracking_uri="none", tile=TILE)
    manifest = segment(scene, tmp_path / "o.tif", model=slim, options=asked, stop=lambda: True)
    assert (manifest["status"], manifest["tiles"]["done"]) == ("interrupted", 0)


def test_a_second_command_is_turned_away_while_the_first_runs(command: Command) -> None:
    """Two drivers in one run directory would do everything twice."""
    first = command.start()
    command.until(first, three)
    first.send_signal(signal.SIGSTOP)  # or it might be done before the second has started
    second = command.start()
    _, text = second.communicate(timeout=60)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 75
    assert str(first.pid) in text.decode()
    first.terminate()
    assert first.wait(timeout=120) == 130


def test_a_damaged_chunk_is_found_and_done_again(command: Command, wanted: str) -> None:
    """After a power loss the ledger may call done what the disk has lost."""
    first = command.start()
    command.until(first, three)
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=120)
    mask = Path(f"{command.output}.run/mask.zarr")
    chunk = next(path for path in mask.rglob("*") if path.is_file() and path.name != "zarr.json")
    chunk.write_bytes(chunk.read_bytes()[:-5])
    second = command.start()
    _, text = second.communicate(timeout=300)
    assert second.returncode == 0, text.decode()
    assert "damaged" in text.decode()
    assert file_digest(command.output) == wanted
