"""Many cases through one pool: each done once, bad ones in the table, nothing done without need."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from batches import OPTIONS, computed, states, write_scene
from command import Command
from scenes import fresh

from adapters.ledger_file import CaseLedgerFile, LedgerFile
from pipeline.errors import PlanError
from workflows.batching import batch
from workflows.run_dir import file_digest
from workflows.segmenting import segment


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], slim: Path
) -> Command:
    return Command(monkeypatch, capsys, slim)


def test_the_good_are_done_and_the_bad_are_in_the_table(
    archive: Path, tmp_path: Path, run: Callable[..., dict[str, Any]], slim: Path, slim3d: Path
) -> None:
    """Each mask is what ``segment`` makes of that file alone: sharing a pool changes no byte."""
    out = tmp_path / "out"
    result = run(archive, out)
    assert states(result) == {
        "a": "done", "more__b": "done", "c": "done",
        "cut": "failed", "empty": "quarantined", "gray": "quarantined",
    }  # fmt: skip
    assert result["status"] == "partial"
    reasons = {row["id"]: row["reason"] for row in result["cases"]}
    assert "3 bands" in reasons["gray"]
    assert "SourceReadError" in reasons["cut"]
    for name, source, model in (("a.tif", "a.tif", slim), ("c.nii.gz", "c.nii.gz", slim3d)):
        alone = tmp_path / "alone" / name
        alone.parent.mkdir(exist_ok=True)
        segment(archive / source, alone, model=model, options=OPTIONS)
        assert file_digest(out / name) == file_digest(alone)
    assert sorted(p.name for p in out.glob("*.nii.gz")) == ["c.nii.gz"]
    assert not (out / "cut.tif").exists()


def test_the_tables_say_what_the_masks_hold(
    archive: Path, tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """The table is what most people will read instead of the masks."""
    out = tmp_path / "out"
    result = run(archive, out)
    assert json.loads((out / "cases.json").read_text()) == json.loads(json.dumps(result))
    with (out / "cases.csv").open() as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert len(rows) == 6
    labels = np.asarray(nib.load(out / "c.nii.gz").dataobj)
    for value in range(2):
        counted = float((labels == value).sum()) / 1000  # voxels of 1 mm3
        assert float(rows["c"][f"class-{value} volume_ml"]) == pytest.approx(counted)
    assert rows["c"]["class-0 area_m2"] == ""
    assert rows["empty"]["reason"]


def test_a_rerun_does_only_what_is_missing_or_changed(
    archive: Path, tmp_path: Path, run: Callable[..., dict[str, Any]], slim3d: Path
) -> None:
    """An archive is run every night; one new file must cost one file."""
    for name in ("cut.tif", "empty.nii", "gray.tif"):
        (archive / name).unlink()
    out = tmp_path / "out"
    assert computed(run(archive, out)) == {"a", "more__b", "c"}
    assert computed(run(archive, out)) == set()
    os.utime(archive / "a.tif")
    assert computed(run(archive, out)) == set(), "the content is what counts, not the time"
    write_scene(archive / "a.tif", (100, 130), seed=9)
    (out / "c.nii.gz").unlink()
    write_scene(archive / "new.tif", (64, 64), seed=3)
    result = run(archive, out)
    assert computed(result) == {"a", "c", "new"}
    assert set(states(result).values()) == {"done"}
    scenes = {"a", "more__b", "new"}  # the scan is one tile with either side: the same plan
    assert computed(run(archive, out, crf="off", tile=32)) == scenes
    other = fresh(tmp_path / "other", classes=3).path
    again = run(archive, out, crf="off", tile=32, models=[other, slim3d])
    assert computed(again) == scenes


def test_a_stopped_batch_has_every_case_in_its_table(
    archive: Path, tmp_path: Path, slim: Path, command: Command
) -> None:
    """The table of the night before must not shrink to what a stopped one got through."""
    result = batch([archive], tmp_path / "out", models=[slim], options=OPTIONS, stop=lambda: True)
    assert result["status"] == "interrupted"
    assert result["counts"]["total"] == len(result["cases"]) == 6
    assert states(result)["a"] == "queued"


def test_a_small_case_does_not_wait_behind_a_giant_one(
    tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """Tiles of open cases take turns."""
    giant = write_scene(tmp_path / "giant.tif", (640, 640), seed=1)
    small = [write_scene(tmp_path / f"s{n}.tif", (60, 60), seed=n) for n in range(3)]
    run([giant, *small], tmp_path / "out")
    history = CaseLedgerFile(tmp_path / "out.run/ledger", owner="t").history()
    done = [record.case for record in history if record.state == "done"]
    assert done[-1] == "giant"


def test_a_stopped_batch_goes_on_where_it_was(
    tmp_path: Path, slim: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """Ctrl-C keeps what was done, of cases begun as well."""
    sources = [write_scene(tmp_path / f"s{n}.tif", (128, 128), seed=n) for n in range(4)]
    out, asked = tmp_path / "out", 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 12

    result = batch(sources, out, models=[slim], options=OPTIONS, stop=stop)
    assert result["status"] == "interrupted"
    assert run(sources, out)["status"] == "done"
    for n in range(4):
        history = list(LedgerFile(tmp_path / f"out.run/cases/s{n}/ledger", owner="t").history())
        assert len(history) == len({record.key for record in history}) == 4 + 2, "tiles and samples"


def test_a_pattern_puts_masks_where_it_says(
    archive: Path, tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """State and tables stay together while masks go to a folder of each week."""
    pattern = tmp_path / "weekly/w1/{id}-mask"
    with pytest.raises(PlanError, match="--run-dir"):
        run(archive / "a.tif", pattern)
    state = tmp_path / "state"
    assert computed(run(archive / "a.tif", pattern, run_dir=state)) == {"a"}
    assert (tmp_path / "weekly/w1/a-mask.tif").exists()
    assert (state / "cases.csv").exists()
    later = Path(str(pattern).replace("w1", "w2"))
    assert computed(run(archive / "a.tif", later, run_dir=state)) == set()


def test_ray_gives_the_same_bytes_and_loads_each_model_once(
    archive: Path, tmp_path: Path, run: Callable[..., dict[str, Any]], cluster: None
) -> None:
    """The pool is shared by all cases: a model loaded per case would cost more than the case."""
    run(archive, tmp_path / "serial")
    result = run(archive, tmp_path / "ray", backend="ray", workers=2)
    assert result["counts"]["done"] == 3
    for name in ("a.tif", "more__b.tif", "c.nii.gz"):
        assert file_digest(tmp_path / "ray" / name) == file_digest(tmp_path / "serial" / name)
    records = [
        record
        for ledger in (tmp_path / "ray.run/cases").glob("*/ledger")
        for record in LedgerFile(ledger, owner="t").history()
    ]
    assert max(record.loads for record in records) <= 4, "staged and whole, 2-D and 3-D"


def test_the_command_answers_3_and_names_the_bad(
    archive: Path, tmp_path: Path, slim: Path, slim3d: Path, command: Command
) -> None:
    """Schedulers look at the exit code, people at the lines."""
    line = ["batch", archive, "-o", tmp_path / "out", "--model", slim, "--backend", "serial",
            "--tracking-uri", "none", "--precision", "fp32", "--tile", "64"]  # fmt: skip
    answer = command(*line, "--model", slim3d, "--json")
    assert answer.code == 3
    assert answer.manifest["counts"]["done"] == 3
    assert "gray quarantined" in answer.err
    empty = tmp_path / "nothing"
    empty.mkdir()
    command("batch", empty, "-o", tmp_path / "o", "--model", slim).refuses("no raster or volume")
    # Without the model for volumes the scan is a verdict, and it is the table that says so.
    shutil.rmtree(tmp_path / "out.run")
    answer = command(*line, "--json", "--fresh")
    rows = {row["id"]: row for row in answer.manifest["cases"]}
    assert "3 axes" in rows["c"]["reason"]


def test_mlflow_holds_one_run_with_the_table(
    archive: Path, tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """A run for each of ten thousand scans would bury the tracker."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    result = run(archive, tmp_path / "out", tracking_uri=uri)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("terravox")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == result["mlflow_run_id"]
    assert found.data.metrics["cases_done"] == 3
    assert found.data.metrics["cases_failed"] == 3
    assert {a.path for a in client.list_artifacts(found.info.run_id)} == {"cases.csv", "cases.json"}
    manifest = json.loads((tmp_path / "out.run/cases/a/manifest.json").read_text())
    assert manifest["mlflow_run_id"] == found.info.run_id
    (archive / "cut.tif").unlink()
    run(archive, tmp_path / "out", tracking_uri=uri)
    assert len(client.search_runs([experiment.experiment_id])) == 1, "nothing new, no run"


def test_a_mask_finished_but_not_noted_is_not_computed_again(
    tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """The driver may be killed after it gave the mask its name and before it wrote that down."""
    source, out = write_scene(tmp_path / "a.tif", (64, 64), seed=1), tmp_path / "out"
    run(source, out)
    (ledger,) = (tmp_path / "out.run/ledger").glob("*.jsonl")
    lines = ledger.read_text().splitlines(keepends=True)
    assert '"state":"done"' in lines[-1]
    ledger.write_text("".join(lines[:-1]))
    result = run(source, out)
    assert states(result) == {"a": "done"}
    assert computed(result) == set()
    assert result["cases"][0]["classes"]
