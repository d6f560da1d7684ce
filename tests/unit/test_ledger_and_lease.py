"""Durability: what the ledger and the lease promise when processes die."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from adapters import lease_file
from adapters.lease_file import Holder, LeaseFile, read_holder
from adapters.ledger_file import LedgerFile
from pipeline.domain import TileKey
from pipeline.errors import LeaseHeldError, StoreError
from pipeline.ports import Record

DONE = Record(
    key=TileKey("scene", "segment", 3),
    status="done",
    digest="ab",
    worker="host:1",
    loads=1,
    seconds={"read": 0.5},
    counts={0: 10, 255: 6},
)


def test_what_is_appended_is_read_back_equal(tmp_path: Path) -> None:
    """A field lost on the way would make resume or the manifest wrong."""
    ledger = LedgerFile(tmp_path, owner="a")
    ledger.append(DONE)
    assert LedgerFile(tmp_path, owner="b").records() == {DONE.key: DONE}


def test_a_later_segment_replaces_an_earlier_record(tmp_path: Path) -> None:
    """A tile that failed once and was done later is done."""
    LedgerFile(tmp_path, owner="zz").append(replace(DONE, status="failed", error="bad"))
    LedgerFile(tmp_path, owner="aa").append(DONE)
    assert LedgerFile(tmp_path, owner="c").records()[DONE.key].status == "done"


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    """kill -9 in the middle of a write must not make the run unreadable."""
    ledger = LedgerFile(tmp_path, owner="a")
    ledger.append(DONE)
    ledger.append(replace(DONE, key=DONE.key._replace(number=4)))
    segment = next(tmp_path.glob("*.jsonl"))
    segment.write_bytes(segment.read_bytes()[:-20])
    assert list(LedgerFile(tmp_path, owner="b").records()) == [DONE.key]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    """Silently dropping a record in the middle would hide a corrupt disk."""
    ledger = LedgerFile(tmp_path, owner="a")
    ledger.append(DONE)
    ledger.append(DONE)
    segment = next(tmp_path.glob("*.jsonl"))
    segment.write_bytes(b"x" + segment.read_bytes())
    with pytest.raises(StoreError, match="line 1"):
        LedgerFile(tmp_path, owner="b").records()


def test_a_full_disk_is_one_line_that_names_the_tile(tmp_path: Path) -> None:
    """An unnoticed short write would call a tile done that is not in the ledger."""
    ledger = LedgerFile(tmp_path, owner="a")
    ledger.append(DONE)
    assert ledger._lines._segment is not None
    os.dup2(os.open("/dev/full", os.O_WRONLY), ledger._lines._segment)
    with pytest.raises(StoreError, match="tile 3"):
        ledger.append(DONE)


def test_a_live_owner_keeps_others_out_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Two drivers in one directory would redo and mix work."""
    with LeaseFile(tmp_path) as guard:
        guard.check()
        with pytest.raises(LeaseHeldError, match=str(os.getpid())), LeaseFile(tmp_path):
            pass
        guard.check()
    assert read_holder(tmp_path / "lease.json") is None
    with LeaseFile(tmp_path):
        pass


def test_a_killed_owner_of_this_host_is_taken_over_at_once(tmp_path: Path) -> None:
    """After kill -9 the same command must go on without waiting for an expiry."""
    code = f"""
import os, signal, sys, pathlib
from adapters.lease_file import LeaseFile
with LeaseFile(pathlib.Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -9
    assert read_holder(tmp_path / "lease.json") is not None
    with LeaseFile(tmp_path) as guard:
        guard.check()


def test_a_remote_owner_is_taken_over_only_when_expired(tmp_path: Path) -> None:
    """A process id means nothing on another host; the clock decides there."""
    remote = replace(Holder.me("token"), host="elsewhere", pid=1)
    path = tmp_path / "lease.json"
    path.write_text(json.dumps(asdict(remote)))
    with pytest.raises(LeaseHeldError, match="elsewhere"), LeaseFile(tmp_path):
        pass
    path.write_text(json.dumps(asdict(replace(remote, expires=time.time() - 1))))
    with LeaseFile(tmp_path):
        pass


def test_the_workers_of_a_stale_owner_are_refused(tmp_path: Path) -> None:
    """An actor that outlives its driver must not write into the next run."""
    with LeaseFile(tmp_path) as stale:
        (tmp_path / "lease.json").write_text(
            json.dumps(asdict(replace(Holder.me("someone else"), host="elsewhere")))
        )
        with pytest.raises(LeaseHeldError, match="taken over"):
            stale.check()


def test_a_directory_in_which_nothing_came_to_be_goes_with_its_lease(tmp_path: Path) -> None:
    """A request that is refused must leave nothing, and a run must keep what it made."""
    with LeaseFile(tmp_path / "a.run"):
        pass
    with LeaseFile(tmp_path / "b.run"):
        (tmp_path / "b.run/plan.json").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["b.run"]


@pytest.mark.parametrize("gone", ["lock", "directory"])
def test_who_waited_for_a_lock_that_was_deleted_still_keeps_others_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """The file that it waited for is nobody's any more: a third would lock another one."""
    run, waited = tmp_path / "o.run", fcntl.flock

    def waits(handle: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", waited)
        (run / "lease.lock").unlink()
        if gone == "directory":
            run.rmdir()
        waited(handle, how)

    monkeypatch.setattr(fcntl, "flock", waits)
    with LeaseFile(run), pytest.raises(LeaseHeldError), LeaseFile(run):
        pass
    assert not run.exists()


def test_what_cannot_be_tidied_up_does_not_hide_what_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount, or a share that keeps open files, would have a damaged scan called a full disk."""

    def refuse(path: Path) -> None:
        raise PermissionError(f"not yours: {path}")

    monkeypatch.setattr(Path, "rmdir", refuse)
    with pytest.raises(ValueError, match="a scan"), LeaseFile(tmp_path / "o.run"):
        raise ValueError("a scan is damaged")


def test_a_machine_that_does_not_say_who_it_is_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not there would be taken for a directory that somebody has just deleted."""

    def absent() -> str:
        return Path("/proc/none").read_text()

    monkeypatch.setattr(lease_file, "_boot_id", absent)
    with pytest.raises(StoreError, match="cannot be written to"), LeaseFile(tmp_path / "o.run"):
        pass
