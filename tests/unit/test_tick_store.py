"""Ticks in SQLite: what a row says after every way in which a tick can end."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from adapters.tick_store import ModelPin, TickStore
from pipeline.errors import StoreError

MONDAY = datetime(2026, 11, 16, 3, tzinfo=UTC)
WEEK = timedelta(days=7)
NOW = MONDAY + timedelta(minutes=1)
PIN = ModelPin(uri="models:/land@champion", name="land", version="3", digest="ab")


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "state" / "ticks.sqlite"


@pytest.fixture
def store(path) -> TickStore:
    return TickStore(path, workflow="weekly")


def test_a_tick_is_kept_from_begin_to_end(store, path):
    """Another process, a week later, decides by these values alone."""
    begun = store.begin(MONDAY, now=NOW)
    assert (begun.tick, begun.status, begun.finished) == (
        "2026-11-16T03:00:00+00:00",
        "running",
        None,
    )
    store.pin(MONDAY, [PIN])
    later = NOW + timedelta(hours=1)
    store.finish(MONDAY, "partial", now=later, counts={"done": 2, "failed": 1}, reason="1 failed")
    row = TickStore(path, workflow="weekly").get(MONDAY)
    assert row is not None
    assert (row.status, row.models, row.counts) == ("partial", (PIN,), {"done": 2, "failed": 1})
    assert (row.started, row.finished) == ("2026-11-16T03:01:00+00:00", "2026-11-16T04:01:00+00:00")
    assert row.reason == "1 failed"
    assert not row.settled


@pytest.mark.parametrize("status", ["running", "partial", "failed", "interrupted"])
def test_an_unfinished_tick_is_begun_again_with_its_pins(store, status):
    """The alias may have moved since: half a tick with each model is no result."""
    store.begin(MONDAY, now=NOW)
    store.pin(MONDAY, [PIN])
    if status != "running":  # else its process was killed
        store.finish(MONDAY, status, now=NOW, reason="why")
    again = store.begin(MONDAY, now=NOW + timedelta(hours=2))
    assert (again.status, again.models, again.reason, again.finished) == (
        "running",
        (PIN,),
        "",
        None,
    )
    assert again.started == "2026-11-16T03:01:00+00:00"


def test_a_done_tick_stays_done(store):
    """A second cron line, or a retry by Kubernetes, must not open it again."""
    store.begin(MONDAY, now=NOW)
    store.finish(MONDAY, "done", now=NOW, counts={"done": 5})
    again = store.begin(MONDAY, now=NOW + timedelta(hours=2))
    assert again.settled
    assert again == store.get(MONDAY)
    assert again.counts == {"done": 5}


def test_a_later_tick_supersedes_what_is_not_done_and_nothing_else(store):
    """Two ticks that both think the work is theirs would do it twice."""
    for week, status in enumerate(["done", "failed", "partial"]):
        tick = MONDAY + week * WEEK
        store.begin(tick, now=tick)
        store.finish(tick, status, now=tick)
    store.begin(MONDAY + 3 * WEEK, now=MONDAY + 3 * WEEK)  # killed
    store.begin(MONDAY + 4 * WEEK, now=MONDAY + 4 * WEEK)
    assert [row.status for row in store.history()] == [
        "done", "superseded", "superseded", "superseded", "running",
    ]  # fmt: skip
    assert "2026-12-14T03:00:00+00:00" in store.history()[3].reason


def test_a_tick_that_is_still_to_come_does_not_stop_those_of_today(store):
    """A clock that once ran ahead would end the workflow for good, and call that done."""
    store.begin(MONDAY + 50 * WEEK, now=MONDAY)
    assert store.begin(MONDAY, now=MONDAY).status == "running"


def test_a_tick_older_than_the_latest_is_superseded_from_the_start(store):
    """A clock that is set back must not start last week's tick beside this week's."""
    store.begin(MONDAY, now=NOW)
    old = store.begin(MONDAY - WEEK, now=NOW)
    assert old.status == "superseded"
    assert old.settled
    assert store.get(MONDAY).status == "running"


def test_a_state_directory_belongs_to_one_workflow(store, path):
    """Two workflows with one run directory undo each other's cases at every tick."""
    store.begin(MONDAY, now=NOW)
    with pytest.raises(StoreError, match=r"state of workflow weekly, not of nightly"):
        TickStore(path, workflow="nightly").begin(MONDAY, now=NOW)


def test_a_time_not_in_utc_is_our_bug(store):
    """The same instant under two names would be two ticks."""
    with pytest.raises(AssertionError):
        store.begin(MONDAY.astimezone(timezone(timedelta(hours=1))), now=NOW)


@pytest.mark.parametrize(
    "content",
    [b"this is no database" * 100, b"SQLite format 3\0" + b"\0" * 4080],
    ids=["text", "torn"],
)
def test_a_damaged_file_is_said_in_one_line(path, store, content):
    """It may not be taken for an empty one: everything would be done again."""
    path.parent.mkdir()
    path.write_bytes(content)
    for act in (store.history, lambda: store.begin(MONDAY, now=NOW)):
        with pytest.raises(StoreError, match=r"ticks\.sqlite") as refusal:
            act()
        assert "\n" not in str(refusal.value)
    assert path.read_bytes() == content


def test_another_programs_or_a_newer_database_is_left_alone(path, store):
    """Our tables do not belong in it, and we cannot read a newer one."""
    path.parent.mkdir()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE theirs (x)")
    with pytest.raises(StoreError, match="no tick store"):
        store.begin(MONDAY, now=NOW)
    path.unlink()
    store.begin(MONDAY, now=NOW)
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 2")
    with pytest.raises(StoreError, match="it says 2"):
        store.history()


def test_a_row_whose_values_are_not_ours_is_said(path, store):
    """A hand-edited row must not become a traceback."""
    store.begin(MONDAY, now=NOW)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE ticks SET models = '{'")
    with pytest.raises(StoreError, match="2026-11-16"):
        store.history()


def test_processes_that_write_at_once_wait_for_one_another(path):
    """SQLite refuses a second writer at once unless it is told to wait."""
    code = (
        "import sys; from pathlib import Path; from datetime import datetime, timedelta, UTC\n"
        "from adapters.tick_store import TickStore\n"
        "store, n = TickStore(Path(sys.argv[1]), workflow='w'), int(sys.argv[2])\n"
        "for k in range(20):\n"
        "    t = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=20 * n + k)\n"
        "    store.begin(t, now=t); store.finish(t, 'done', now=t)\n"
    )
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    line = [sys.executable, "-c", code, str(path)]
    processes = [subprocess.Popen([*line, str(n)], env=env) for n in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert len(TickStore(path, workflow="w").history()) == 60
