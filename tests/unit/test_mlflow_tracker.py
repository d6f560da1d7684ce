"""MLflow runs: what is written, resumed and cut, and that a failing tracker fails no run."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapters.mlflow_tracker import CUT_MARK, MlflowTracker, NoTracker


@pytest.fixture(scope="session")
def migrated(tmp_path_factory) -> Path:
    """A database with its tables, made once: creating them takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    tracker = tracker_at(folder)
    tracker.start(params={}, tags={})
    assert tracker.error is None
    return folder / "mlflow.db"


@pytest.fixture
def folder(migrated, tmp_path) -> Path:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return tmp_path


def tracker_at(folder: Path, *, experiment: str = "warm-up", run_id: str | None = None):
    uri = f"sqlite:///{folder}/mlflow.db"
    return MlflowTracker(uri, experiment=experiment, run_name="scene", run_id=run_id)


def client_of(folder: Path):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")


def test_a_run_holds_params_figures_over_time_tags_and_files(folder):
    """What a person opens MLflow for; artifacts must lie beside the database, not in the cwd."""
    picture = folder / "quicklook.png"
    picture.write_bytes(b"png")
    tracker = tracker_at(folder, experiment="crops")
    tracker.start(params={"tiling.halo": "64"}, tags={"fingerprint": "abc"})
    for step in (1, 2):
        tracker.metrics({"tiles_per_s": step * 1.5, "area_ha.bare (dry) [x]": 3}, step=step)
    tracker.finish("done", artifacts=[picture])
    assert tracker.error is None
    run = client_of(folder).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "scene"
    assert run.data.params == {"tiling.halo": "64"}
    assert run.data.tags["fingerprint"] == "abc"
    assert run.data.tags["terravox.status"] == "done"
    assert run.data.metrics["area_ha.bare _dry_ _x_"] == 3
    history = client_of(folder).get_metric_history(tracker.run_id, "tiles_per_s")
    assert [(point.step, point.value) for point in history] == [(1, 1.5), (2, 3.0)]
    assert list(folder.glob("mlartifacts/**/quicklook.png"))


def test_more_params_than_a_batch_and_overlong_values_are_logged(folder):
    """MLflow refuses 101 params at once and long values; the whole run record would be lost."""
    params = {f"p{n}": "v" for n in range(250)} | {"long": "x" * 7000}
    tracker = tracker_at(folder)
    tracker.start(params=params, tags={"long": "y" * 9000})
    assert tracker.error is None
    data = client_of(folder).get_run(tracker.run_id).data
    assert len(data.params) == 251
    assert data.params["long"].endswith(CUT_MARK)
    assert data.tags["long"].endswith(CUT_MARK)
    assert len(data.params["long"]) == 6000


def test_a_resumed_run_is_the_same_run(folder):
    """A night with three restarts must be one run in MLflow, with its params unrefused."""
    first = tracker_at(folder)
    first.start(params={"a": "1"}, tags={})
    first.metrics({"tiles_done": 3}, step=3)
    first.finish("interrupted", artifacts=[])
    assert client_of(folder).get_run(first.run_id).info.status == "KILLED"
    second = tracker_at(folder, run_id=first.run_id)
    second.start(params={"a": "1", "b": "2"}, tags={})
    assert second.run_id == first.run_id
    assert client_of(folder).get_run(first.run_id).info.status == "RUNNING"
    second.metrics({"tiles_done": 6}, step=6)
    second.finish("partial", artifacts=[])
    assert second.error is None
    run = client_of(folder).get_run(first.run_id)
    assert (run.info.status, run.data.tags["terravox.status"]) == ("FAILED", "partial")
    assert run.data.params == {"a": "1", "b": "2"}


def test_a_broken_database_is_said_once_and_stops_nothing(tmp_path, caplog):
    """The night's segmentation must not die of its log book."""
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    tracker = tracker_at(tmp_path)
    with caplog.at_level(logging.WARNING, logger="adapters.mlflow_tracker"):
        tracker.start(params={"a": "1"}, tags={})
        tracker.metrics({"b": 2.0}, step=1)
        tracker.finish("done", artifacts=[tmp_path / "absent.png"])
    assert tracker.run_id is None
    assert "could not open the run" in tracker.error
    ours = [r for r in caplog.records if r.name == "adapters.mlflow_tracker"]
    assert len(ours) == 1


def test_a_database_has_all_its_tables_from_the_first_moment(tmp_path):
    """The first command in a folder, killed while it makes them, would end tracking there."""
    database = tmp_path / "mlflow.db"
    start = (
        "from adapters.mlflow_tracker import MlflowTracker\n"
        f"t = MlflowTracker('sqlite:///{database}', experiment='e', run_name='r')\n"
        "t.start(params={}, tags={})"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", start], env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    while not database.exists():
        assert first.poll() is None
        time.sleep(0.001)
    first.kill()
    first.wait()
    with contextlib.closing(sqlite3.connect(database)) as tables:
        assert tables.execute("select count(*) from alembic_version").fetchall() == [(1,)]
    again = tracker_at(tmp_path)
    again.start(params={}, tags={})
    assert again.run_id


def test_an_unknown_kind_of_server_and_an_unknown_run_are_recorded(folder):
    """A mistyped address is a note in the manifest, not the end of the run."""
    wrong = MlflowTracker("gopher://nowhere", experiment="e", run_name="r")
    wrong.start(params={}, tags={})
    assert "could not open the run" in wrong.error
    absent = tracker_at(folder, run_id="0" * 32)
    absent.start(params={}, tags={})
    assert absent.run_id is None
    assert absent.error


def test_figures_that_could_not_be_sent_arrive_at_the_end(folder):
    """A database locked for a minute must not cost the curve of the whole night."""
    tracker = tracker_at(folder)
    tracker.start(params={}, tags={})
    send, calls = tracker._client.log_batch, []

    def locked_once(run_id, **kwargs):
        calls.append(kwargs)
        if len(calls) == 1:
            raise OSError("database is locked")
        send(run_id, **kwargs)

    tracker._client.log_batch = locked_once
    for step in range(3):
        tracker.metrics({"tiles_done": step}, step=step)
    assert len(calls) == 1
    tracker.finish("done", artifacts=[folder / "absent.png"])
    assert "database is locked" in tracker.error
    history = client_of(folder).get_metric_history(tracker.run_id, "tiles_done")
    assert [point.value for point in history] == [0, 1, 2]
    assert client_of(folder).get_run(tracker.run_id).info.status == "FINISHED"


def test_importing_the_adapter_does_not_import_mlflow():
    """`--help` would take three seconds."""
    code = "import sys, adapters.mlflow_tracker; sys.exit('mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_is_quiet_and_leaves_nothing_in_the_working_folder(folder, tmp_path_factory):
    """Chatter breaks the progress bar, stray folders litter; telemetry would phone home."""
    cwd = tmp_path_factory.mktemp("cwd")
    code = (
        "from adapters.mlflow_tracker import MlflowTracker\n"
        f"t = MlflowTracker('sqlite:///{folder}/new/mlflow.db', experiment='e', run_name='r')\n"
        "t.start(params={'a': '1'}, tags={}); t.metrics({'b': 1.0}, step=1)\n"
        "t.finish('done', artifacts=[]); assert t.error is None and t.run_id\n"
        "import os; assert os.environ['MLFLOW_DISABLE_TELEMETRY'] == 'true'\n"
    )
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    env.pop("MLFLOW_DISABLE_TELEMETRY", None)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=True
    )
    assert (result.stdout, result.stderr) == ("", "")
    assert not list(cwd.iterdir())


def test_no_tracker_has_no_run():
    """Code that follows a run must see that there is none."""
    tracker = NoTracker()
    tracker.start(params={}, tags={})
    tracker.metrics({"a": 1.0}, step=1)
    tracker.finish("done", artifacts=[])
    assert (tracker.run_id, tracker.error) == (None, None)
