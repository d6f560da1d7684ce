"""``terravox crf tune``: the grid, the best of it, and where that goes."""

from __future__ import annotations

import csv
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from command import Command, tree
from own_networks import Hourglass, exported, own_bundle
from scenes import write_raster

from pipeline.models.bundle import load_bundle

pytest.importorskip("pydensecrf.densecrf", reason="the extra 'crf' is not installed")

CRF = {
    "engine": "pydensecrf",
    "iterations": 5,
    "smoothness": {"weight": 1, "position": 1},
    "appearance": {
        "weight": 1, "position_m": 10, "value": 200, "bands": ["1", "2", "3"],
        "range": [0, 1000],
    },
}  # fmt: skip


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """Two images whose colours tell the classes, while their scores are wrong in two fifths."""
    rng, rows = np.random.default_rng(4), ["image,scores,reference"]
    for name in ("a", "b"):
        truth_YX = np.kron(rng.integers(0, 4, (8, 8)), np.ones((8, 8), int)).astype(np.uint8)
        colour_KC = np.array([[150, 300, 900], [800, 200, 400], [500, 800, 100], [200, 700, 700]])
        image_CYX = np.moveaxis(colour_KC[truth_YX], -1, 0) + rng.normal(0, 15, (3, 64, 64))
        odds_KYX = np.exp(rng.normal(0, 1, (4, 64, 64)) + (truth_YX == np.arange(4)[:, None, None]))
        truth_YX[:5] = 255
        write_raster(tmp_path / f"{name}.tif", image_CYX.astype(np.uint16))
        prob_KYX = (odds_KYX / odds_KYX.sum(0)).astype(np.float32)
        write_raster(tmp_path / f"{name}_scores.tif", prob_KYX, nodata=None)
        write_raster(tmp_path / f"{name}_truth.tif", truth_YX[None], nodata=255)
        rows.append(f"{name}.tif,{name}_scores.tif,{name}_truth.tif")
    (tmp_path / "crf.yaml").write_text(yaml.safe_dump(CRF))
    path = tmp_path / "examples.csv"
    path.write_text("\n".join(rows))
    return path


@pytest.fixture
def terravox(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys, Path())


def tune(command: Command, examples: Path, *more: object):
    folder = examples.parent
    return command(
        "crf", "tune", examples, "-o", folder / "best.yaml", "--crf", folder / "crf.yaml",
        "--weights", "1,4", "--positions", "20,60", "--values", "10,60,200", "--json", *more,
    )  # fmt: skip


def test_the_best_of_the_grid_is_kept_in_file_bundle_and_tracker(
    examples, terravox, slim, tmp_path
):
    """The worst one, or a setting that was not tried, would be shipped with the model."""
    import mlflow

    bundle, store = tmp_path / "bundle", f"sqlite:///{tmp_path}/mlflow.db"
    shutil.copytree(slim, bundle)
    answer = tune(terravox, examples, "--tracking-uri", store, "--into", bundle)
    assert answer.code == 0, answer.err
    result = answer.manifest
    with (tmp_path / "best.yaml.run" / "trials.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert len(rows) == len({tuple(row.values())[:3] for row in rows}) == result["trials"]
    assert {row["weight"] for row in rows} > {1.0, 4.0}
    assert len(rows) > 12
    best = max(rows, key=lambda row: row["mean_iou"])
    assert result["mean_iou"] == pytest.approx(best["mean_iou"], abs=1e-6)
    assert min(row["mean_iou"] for row in rows) + 0.1 < best["mean_iou"]
    assert result["mean_iou_without_crf"] + 0.3 < best["mean_iou"]
    crf = yaml.safe_load((tmp_path / "best.yaml").read_text())["crf"]
    kernel = crf["appearance"]
    found = {"weight": kernel["weight"], "position": kernel["position_m"], "value": kernel["value"]}
    assert found == {key: result[key] for key in found}
    assert crf == CRF | {"appearance": CRF["appearance"] | kernel}
    assert load_bundle(bundle).crf == crf
    weights = [load_bundle(path).network().state_dict() for path in (slim, bundle)]
    assert all(weights[1][key].equal(value) for key, value in weights[0].items())
    client = mlflow.MlflowClient(store)
    run = client.get_run(result["mlflow_run_id"])
    assert run.data.metrics["best_mean_iou"] == pytest.approx(result["mean_iou"])
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"trials.csv", "best.yaml"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"appearance": None}, "one kernel with guide bands is needed to tune, found 0"),
        ({"appearance": CRF["appearance"] | {"position_m": [9, 9]}}, "one deviation for all axes"),
    ],
)
def test_a_crf_that_cannot_be_tuned_is_refused(examples, terravox, change, words):
    """A search over a kernel that is not there would try one setting many times."""
    crf = {key: value for key, value in (CRF | change).items() if value}
    (examples.parent / "crf.yaml").write_text(yaml.safe_dump(crf))
    tune(terravox, examples, "--tracking-uri", "none").refuses(words)
    assert not (examples.parent / "best.yaml").exists()


@pytest.mark.parametrize(
    ("output", "words"),
    [("examples.csv", "an input"), ("crf.yaml", "an input"), (".", "is a directory")],
)
def test_an_output_that_cannot_be_is_refused_before_the_search(examples, terravox, output, words):
    """It would replace what it began with, or fail after hours."""
    before = tree(examples.parent)
    tune(terravox, examples, "--tracking-uri", "none", "-o", examples.parent / output).refuses(
        "output", words
    )
    assert tree(examples.parent) == before


def test_a_search_that_could_find_nothing_is_refused_and_one_that_did_says_so(
    examples, terravox, tmp_path, caplog
):
    """A CRF that made the labels worse would be shipped, or the first of many that are all NaN."""
    quiet = ("--tracking-uri", "none")
    tune(terravox, examples, *quiet, "--device", "tpu").refuses("--device tpu", "cpu, cuda")
    tune(terravox, examples, *quiet, "--device", "cuda").refuses("pydensecrf runs on the CPU")
    examples.write_text("image,scores,reference\na.tif,a_scores.tif,truth.tif")
    write_raster(tmp_path / "truth.tif", np.full((1, 64, 64), 255, np.uint8), nodata=255)
    tune(terravox, examples, *quiet).refuses("no reference has a class")
    assert not (tmp_path / "best.yaml").exists()
    truth_YX = np.random.default_rng(0).integers(0, 4, (64, 64)).astype(np.uint8)
    sure_KYX = np.where(truth_YX == np.arange(4)[:, None, None], 0.4, 0.2).astype(np.float32)
    write_raster(tmp_path / "truth.tif", truth_YX[None], nodata=255)
    write_raster(tmp_path / "a_scores.tif", sure_KYX, nodata=None)
    answer = tune(terravox, examples, *quiet)
    assert (answer.code, answer.manifest["mean_iou_without_crf"]) == (0, 1.0)
    assert (answer.manifest["engine"], answer.manifest["device"]) == ("pydensecrf", "cpu")
    assert "--crf off is better" in caplog.text


def test_a_list_or_grid_that_cannot_be_meant_is_refused(examples, terravox):
    """A reference of another place, or letters for numbers, would be found after hours."""
    tune(terravox, examples, "--tracking-uri", "none", "--weights", "a,b").refuses("--weights a,b")
    tune(terravox, examples, "--tracking-uri", "none", "--weights", "4,1").refuses("rising numbers")
    examples.write_text("image,scores\na.tif,a_scores.tif")
    tune(terravox, examples, "--tracking-uri", "none").refuses("line 2", "reference")


def test_the_best_goes_into_a_bundle_that_is_a_program(examples, terravox, tmp_path):
    """The search would end in a missing file, with the bundle as it was."""
    program = exported(Hourglass(3, 4), stride=4)
    bundle = own_bundle(tmp_path / "program", program, stride=4)
    grid = ("--weights", 1, "--positions", 20, "--values", 60, "--tracking-uri", "none")
    answer = tune(terravox, examples, *grid, "--into", bundle.path)
    assert answer.code == 0, answer.err
    assert load_bundle(bundle.path).crf is not None
    assert bundle.weights_file.read_bytes() == program


KILLED = """
import os
import signal
from adapters.mlflow_tracker import MlflowTracker
from workflows.cli import main

noted = MlflowTracker.metrics

def metrics(self, values, *, step):
    noted(self, values, step=step)
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

MlflowTracker.metrics = metrics
main()
"""
"""The command, killed after its fifth trial."""


@pytest.mark.chaos
def test_a_search_that_was_killed_is_closed_and_done_by_the_next_one(examples, terravox, tmp_path):
    """The tracker would show it as running for ever, or half a file pass for the best CRF."""
    import mlflow

    store = f"sqlite:///{tmp_path}/mlflow.db"
    line = tune(lambda *words: [*map(str, words)], examples, "--tracking-uri", store)
    done = subprocess.run([sys.executable, "-c", KILLED, *line], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "best.yaml").exists()
    again = terravox(*line)
    assert again.code == 0, again.err
    assert yaml.safe_load((tmp_path / "best.yaml").read_text())["crf"]["engine"] == "pydensecrf"
    assert {path.name for path in (tmp_path / "best.yaml.run").iterdir()} == {
        "progress.json", "trials.csv"
    }  # fmt: skip
    client = mlflow.MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("terravox").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FINISHED", "KILLED"]
