"""Ticks of real workflows: each input once, whatever is killed, moved, stopped or started twice."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import yaml
from apscheduler.triggers.interval import IntervalTrigger
from scenes import fresh, texture, write_raster
from typer.testing import CliRunner

from adapters.lease_file import LeaseFile
from adapters.ledger_file import CaseLedgerFile
from adapters.tick_store import TickStore
from pipeline.errors import BundleError, LeaseHeldError, PlanError
from workflows.schedule import tick
from workflows.schedule_cli import schedule_app
from workflows.scheduler import run
from workflows.workflow_file import Workflow

MONDAY = datetime(2026, 11, 2, 3, tzinfo=UTC)
WEEK = timedelta(days=7)
SERIAL = {"backend": "serial", "tracking_uri": "none", "crf": "off", "precision": "fp32"}


class Region:
    """A workflow with a folder that grows."""

    def __init__(self, folder: Path, model: str, **changes: object) -> None:
        self.folder, self.state, self.file = folder, folder / "state", folder / "weekly.yaml"
        (folder / "incoming").mkdir(parents=True)
        values = {
            "name": "weekly",
            "sources": ["incoming/*.tif"],
            "models": [model],
            "output": "masks/{tick:%Y-%m-%d}/{id}",
            "state": "state",
            "cron": "0 4 * * mon",
            "timezone": "Europe/Vienna",
            "options": SERIAL,
        }
        self.file.write_text(yaml.safe_dump(values | changes))

    def arrive(self, *names: str) -> None:
        """New scenes of 96 x 96 px."""
        for name in names:
            image = np.stack([texture((96, 96), seed=ord(name[0]) + band) for band in range(3)])
            write_raster(self.folder / "incoming" / f"{name}.tif", image)

    def masks(self) -> list[str]:
        folder = self.folder / "masks"
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.tif"))

    def rows(self) -> list[tuple[str, str]]:
        history = TickStore(self.state / "ticks.sqlite", workflow="weekly").history()
        return [(row.tick[:10], row.status) for row in history]

    def computed(self) -> Counter[str]:
        """How often each case was begun, from the ledger."""
        ledger = CaseLedgerFile(self.state / "run" / "ledger", owner="test")
        return Counter(record.case for record in ledger.history() if record.state == "running")


@pytest.fixture
def region(tmp_path, slim) -> Region:
    return Region(tmp_path / "region", str(slim))


def test_three_ticks_over_a_growing_folder_compute_each_input_once(region):
    """The archive of a year would be computed again every week."""
    region.arrive("a", "b")
    first = tick(region.file, now=MONDAY + timedelta(hours=5))
    assert (first["tick"], first["status"], first["ran"]) == (
        "2026-11-02T03:00:00+00:00",
        "done",
        True,
    )
    assert first["counts"]["computed"] == 2
    region.arrive("c")
    again = tick(region.file, now=MONDAY + timedelta(hours=6))
    assert not again["ran"]
    assert again["counts"] == first["counts"]
    assert tick(region.file, now=MONDAY + WEEK)["counts"]["computed"] == 1
    region.arrive("a")  # the same bytes, a new time
    region.arrive("d", "e")
    third = tick(region.file, now=MONDAY + 2 * WEEK)
    assert (third["counts"]["computed"], third["counts"]["done"]) == (2, 5)
    assert region.computed() == Counter("abcde")
    assert region.masks() == [
        "2026-11-02/a.tif", "2026-11-02/b.tif", "2026-11-09/c.tif", "2026-11-16/d.tif",
        "2026-11-16/e.tif",
    ]  # fmt: skip
    assert [status for _, status in region.rows()] == ["done"] * 3


KILLED = """
import os, signal, sys
from datetime import datetime
from adapters import ledger_file
from workflows.schedule import tick

append, done = ledger_file.CaseLedgerFile.append, []

def append_then_die(self, record):
    append(self, record)
    done.append(record.state == "done")
    if sum(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

ledger_file.CaseLedgerFile.append = append_then_die
tick(sys.argv[1], now=datetime.fromisoformat(sys.argv[2]))
"""


def killed(region: Region, now: datetime) -> None:
    """A tick in a process that dies the moment its second case is noted as done."""
    line = [sys.executable, "-c", KILLED, str(region.file), now.isoformat()]
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    assert subprocess.run(line, env=env, check=False).returncode == -signal.SIGKILL
    assert region.rows()[-1][1] == "running"


@pytest.mark.parametrize("later", [timedelta(hours=1), WEEK], ids=["the same", "the next"])
def test_a_killed_tick_is_gone_on_with_by_the_same_or_the_next(region, later):
    """What it had done is kept, and its row does not say running for ever."""
    region.arrive(*"abcdef")
    killed(region, MONDAY)
    ledger = CaseLedgerFile(region.state / "run" / "ledger", owner="test")
    kept = {name for name, record in ledger.records().items() if record.state == "done"}
    assert len(kept) == 2
    told = tick(region.file, now=MONDAY + later)
    assert (told["status"], told["counts"]["done"]) == ("done", 6)
    begun = region.computed()
    assert set(begun) == set("abcdef")
    assert all(begun[name] == 1 for name in kept)
    done = Counter(r.case for r in ledger.history() if r.state == "done")
    assert done == Counter("abcdef")
    # What was being written when it died may lie in both ticks' folders, whole in each.
    assert {Path(mask).stem for mask in region.masks()} == set("abcdef")
    if later == WEEK:
        assert region.rows() == [("2026-11-02", "superseded"), ("2026-11-09", "done")]
    else:
        assert region.rows() == [("2026-11-02", "done")]


def test_a_tick_that_is_under_way_elsewhere_is_refused(region):
    """Two drivers over one archive would compute it twice."""
    with LeaseFile(region.state), pytest.raises(LeaseHeldError, match=str(os.getpid())):
        tick(region.file, now=MONDAY)
    assert region.rows() == []
    tick(region.file, now=MONDAY)
    assert region.rows() == [("2026-11-02", "done")]


def test_an_interrupted_tick_and_one_with_a_bad_input_are_gone_on_with(region):
    """One broken file may neither hide the others nor be forgotten."""
    region.arrive("a", "b")
    assert tick(region.file, now=MONDAY, stop=lambda: True)["status"] == "interrupted"
    (region.folder / "incoming" / "bad.tif").write_bytes(b"no raster")
    told = tick(region.file, now=MONDAY)
    assert (told["status"], told["ran"], told["counts"]["done"]) == ("partial", True, 2)
    assert "1 " in told["reason"]
    region.arrive("bad")
    assert tick(region.file, now=MONDAY)["status"] == "done"
    assert region.computed() == Counter(["a", "b", "bad"])


def test_what_stops_a_whole_tick_is_in_its_row_and_raised(tmp_path, slim):
    """A person looks at the table in the morning, not at the log of the night."""
    region = Region(tmp_path / "r", "absent")
    region.arrive("a")
    with pytest.raises(BundleError):
        tick(region.file, now=MONDAY)
    row = TickStore(region.state / "ticks.sqlite", workflow="weekly").history()[0]
    assert (row.status, row.models) == ("failed", ())
    assert "absent is no model bundle" in row.reason
    (region.folder / "absent").symlink_to(slim)
    assert tick(region.file, now=MONDAY)["status"] == "done"


def test_an_older_tick_than_the_latest_has_nothing_to_do(region):
    """A retry by Airflow of last week's task must not run beside this week's."""
    tick(region.file, now=MONDAY + WEEK)
    told = tick(region.file, now=MONDAY)
    assert (told["status"], told["ran"]) == ("superseded", False)


def test_a_time_without_an_offset_is_refused(region):
    """It would be another tick on another machine."""
    with pytest.raises(PlanError, match="no offset"):
        tick(region.file, now=datetime(2026, 11, 2, 4))


def test_an_alias_is_resolved_once_a_tick_and_a_resumed_tick_keeps_its_version(tmp_path):
    """Half a map by one model and half by another is no map."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.create_registered_model("land")
    digests = {}
    for version, seed in (("1", 1), ("2", 2)):
        digests[version] = fresh(tmp_path / version, seed=seed).digest
        client.create_model_version("land", source=str(tmp_path / version))
    client.set_registered_model_alias("land", "champion", "1")
    os.environ.pop("MLFLOW_REGISTRY_URI", None)
    region = Region(tmp_path / "r", "models:/land@champion")
    region.arrive("a", "b")
    with pytest.raises(PlanError, match=r"no.* is named: set options"):
        tick(region.file, now=MONDAY)
    region.file.write_text(
        region.file.read_text().replace("tracking_uri: none", f"tracking_uri: {uri}")
    )

    def used(told: dict) -> tuple[str, str]:
        (pin,) = told["models"]
        assert (pin["uri"], pin["name"]) == ("models:/land@champion", "land")
        assert pin["digest"] == digests[pin["version"]]
        return told["status"], pin["version"]

    assert used(tick(region.file, now=MONDAY, stop=lambda: True)) == ("interrupted", "1")
    client.set_registered_model_alias("land", "champion", "2")
    assert used(tick(region.file, now=MONDAY)) == ("done", "1")
    told = tick(region.file, now=MONDAY + WEEK)
    assert used(told) == ("done", "2")
    assert told["counts"]["computed"] == 2  # the model is another, so all is new
    assert sorted(p.name for p in (region.state / "models" / "land").iterdir()) == ["1", "2"]


def each_second(workflow: Workflow) -> IntervalTrigger:
    """Due every second, instead of every week."""
    return IntervalTrigger(seconds=1)


def fake(folder: Path, body: str) -> tuple[str, ...]:
    """A command that appends its --at to ``asked``, and then does ``body``."""
    script = folder / "command.py"
    script.write_text(
        f"import json, signal, sys, time\nfrom pathlib import Path\n"
        f"with open({str(folder / 'asked')!r}, 'a') as f: f.write(sys.argv[-1] + '\\n')\n{body}"
    )
    return (sys.executable, str(script))


def asked(folder: Path) -> list[str]:
    path = folder / "asked"
    return path.read_text().split() if path.exists() else []


def until(condition):
    """A ``stop`` that comes true with ``condition``, and fails after a minute."""
    deadline = time.monotonic() + 60

    def stop() -> bool:
        assert time.monotonic() < deadline
        return condition()

    return stop


def test_the_scheduler_fires_at_its_times_and_outlives_a_failing_tick(region, caplog):
    """A daemon that dies with its first bad night is worse than cron."""
    command = fake(region.folder, "sys.exit(2)")
    with caplog.at_level(logging.WARNING):
        lines = caplog.records
        interrupted = run(
            [region.file],
            trigger=each_second,
            command=command,
            stop=until(lambda: len(lines) >= 2),
        )
    assert not interrupted
    assert lines[1].getMessage() == (
        f"weekly {asked(region.folder)[1]}: failed with exit code 2, see above"
    )


def test_a_stopped_scheduler_drains_the_tick_under_way(region):
    """Stopping a service must keep what its run has done, and say that it was cut."""
    body = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))\n"
    body += f"Path({str(region.folder / 'ready')!r}).touch()\ntime.sleep(60)"
    started = time.monotonic()
    stop = until((region.folder / "ready").exists)
    assert run([region.file], command=fake(region.folder, body), stop=stop)
    assert time.monotonic() - started < 30


def test_a_tick_that_became_due_while_another_ran_is_made_up_for_once(region, monkeypatch):
    """A week's run that takes eight days must not cost the week after it."""
    times = [MONDAY, MONDAY + 3 * WEEK, MONDAY + 3 * WEEK]
    left = iter(times)
    monkeypatch.setattr(Workflow, "last_tick", lambda self, now: next(left, times[-1]))
    stop = until(lambda: len(asked(region.folder)) >= 2)
    run([region.file], command=fake(region.folder, ""), stop=stop)
    assert asked(region.folder) == [times[0].isoformat(), times[1].isoformat()]


def test_two_workflows_with_one_state_are_refused_at_the_start(region):
    """They would turn each other away at every tick."""
    other = region.folder / "other.yaml"
    other.write_text(region.file.read_text().replace("name: weekly", "name: other"))
    with pytest.raises(PlanError, match="two workflows have the state"):
        run([region.file, other], stop=lambda: True)


def test_the_scheduler_runs_the_real_command(region, caplog):
    """On its start it makes up for the tick that was missed; asked again, nothing is done twice."""
    region.arrive("a")
    with caplog.at_level(logging.WARNING, logger="workflows.scheduler"):
        lines = caplog.records
        run([region.file], trigger=each_second, stop=until(lambda: len(lines) >= 2))
    assert region.computed() == Counter("a")
    assert ": done; " in lines[0].getMessage()
    assert "done already" in lines[1].getMessage()


def test_the_command_tells_its_outcome_by_exit_code_and_json(region):
    """Cron, Kubernetes and Airflow know a tick by these alone."""
    region.arrive("a")
    (region.folder / "incoming" / "bad.tif").write_bytes(b"no raster")

    def ask(*more: str):
        return CliRunner().invoke(schedule_app, ["tick", str(region.file), *more])

    partial = ask("--at", "2026-11-02T12:00Z", "--json")
    assert partial.exit_code == 3
    assert json.loads(partial.stdout.splitlines()[-1])["tick"] == "2026-11-02T03:00:00+00:00"
    region.arrive("bad")
    assert ask("--at", "2026-11-02T12:00Z").exit_code == 0
    again = ask("--at", "2026-11-02T12:00Z")
    assert again.exit_code == 0
    assert "nothing to do" in again.stderr
    assert isinstance(ask("--at", "monday").exception, PlanError)
    assert isinstance(ask("--at", "9999-12-31T23:59+14:00").exception, PlanError)
    with LeaseFile(region.state):
        assert isinstance(ask().exception, LeaseHeldError)
