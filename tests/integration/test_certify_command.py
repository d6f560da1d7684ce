"""``terravox certify``: the same verdict on a finished run, or a refusal in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from batches import write_archive
from command import Command, tree
from scenes import fresh, texture, write_raster

from workflows.config import SegmentOptions
from workflows.segmenting import segment


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], slim: Path
) -> Command:
    return Command(monkeypatch, capsys, slim)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    image_CYX = np.stack([texture((150, 190), seed=seed) for seed in (1, 2, 3)])
    return write_raster(tmp_path / "scene.tif", image_CYX)


@pytest.fixture
def bundle(slim: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(slim, tmp_path / "bundle"))


@pytest.fixture
def finished(source: Path, bundle: Path, tmp_path: Path) -> Path:
    """The run directory of a run that passed."""
    options = SegmentOptions(backend="serial", tracking_uri="none", precision="fp32", tile=64)
    manifest = segment(source, tmp_path / "o.tif", model=bundle, options=options)
    assert manifest["seam"]["passed"] is True
    return tmp_path / "o.tif.run"


def test_a_finished_run_is_certified_again(command: Command, finished: Path) -> None:
    """A verdict that nobody can repeat is hearsay."""
    file = finished / "certificate.json"
    before = json.loads(file.read_text())
    file.unlink()
    shutil.rmtree(finished / "mask.zarr")
    answer = command("certify", finished, "--json")
    assert answer.code == 0, answer.err
    assert answer.manifest == json.loads(file.read_text()) == before
    assert "passed" in command("certify", finished).out


def test_a_run_is_certified_from_anywhere(
    command: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths as they were typed mean something in the folder of the run's command alone."""
    (tmp_path / "crf.yaml").write_text("{iterations: 1, smoothness: {weight: 1, position: 1}}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    ran = command.segment(Path("scene.tif"), Path("o.tif"), "--tile", 64, "--crf", "crf.yaml")
    assert ran.code == 0, ran.err
    monkeypatch.chdir(tmp_path / "elsewhere")
    answer = command("certify", tmp_path / "o.tif.run")
    assert answer.code == 0, answer.err


def test_what_tiles_said_is_held_against_a_fresh_read(command: Command, finished: Path) -> None:
    """If the run's own references were believed, a fault in both would stay."""
    piece = next((finished / "samples/tiles").glob("*.npy"))
    logits_KYX = np.load(piece)
    np.save(piece, logits_KYX + 1)
    for kept in (finished / "samples/logits").glob("*.npy"):
        np.save(kept, np.load(kept) + 1)
    answer = command("certify", finished, "--json")
    assert answer.code == 1
    assert answer.manifest["passed"] is False


def _alter_mask(finished: Path) -> tuple[str, ...]:
    with rasterio.open(finished.parent / "o.tif", "r+", IGNORE_COG_LAYOUT_BREAK="YES") as mask:
        labels = mask.read(1)
        mask.write((labels + 1) % 4, 1)
    return "o.tif", "not what the run wrote"


def _alter_source(finished: Path) -> tuple[str, ...]:
    with rasterio.open(finished.parent / "scene.tif", "r+") as source:
        source.write(source.read(1) + 1, 1)
    return "scene.tif", "changed since"


def _move_bundle(finished: Path) -> tuple[str, ...]:
    (finished.parent / "bundle").rename(finished.parent / "moved")
    return "bundle", "--model"


def _other_bundle(finished: Path) -> tuple[str, ...]:
    fresh(finished.parent / "bundle", seed=8)
    return "bundle", "digest"


def _unfinish(finished: Path) -> tuple[str, ...]:
    (finished / "manifest.json").unlink()
    return "not finished", "again"


def _no_run(finished: Path) -> tuple[str, ...]:
    shutil.rmtree(finished)
    finished.mkdir()
    return "no plan.json", "OUT.run"


@pytest.mark.parametrize(
    "change", [_alter_mask, _alter_source, _move_bundle, _other_bundle, _unfinish, _no_run]
)
def test_a_run_whose_parts_have_changed_is_refused(
    command: Command, finished: Path, change: Callable[[Path], tuple[str, ...]]
) -> None:
    """A certificate of another scene, model or mask would be believed."""
    words = change(finished)
    before = tree(finished)
    command("certify", finished).refuses(*words)
    assert tree(finished) == before


def test_a_bundle_that_has_moved_is_named(command: Command, finished: Path) -> None:
    """Bundles are cleaned up; the same one elsewhere is as good."""
    _move_bundle(finished)
    answer = command("certify", finished, "--model", finished.parent / "moved")
    assert answer.code == 0, answer.err


def test_samples_that_are_gone_are_no_pass(command: Command, finished: Path) -> None:
    """There would be nothing to compare, and nothing to complain of."""
    shutil.rmtree(finished / "samples")
    command("certify", finished).refuses("samples", "--fresh", code=1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_fail(command: Command, finished: Path, value: float) -> None:
    """Memory that nobody filled would be taken for a tile that failed, and no verdict given."""
    piece = next((finished / "samples/tiles").glob("*.npy"))
    logits_KYX = np.load(piece)
    logits_KYX[:, 0, 0] = value
    np.save(piece, logits_KYX)
    answer = command("certify", finished, "--json")
    assert answer.code == 1
    assert answer.manifest["passed"] is False
    assert np.isfinite(answer.manifest["max_abs_logit"]), "JSON has no infinity"


def test_samples_that_are_cut_short_are_no_pass(command: Command, finished: Path) -> None:
    """What lacks would be taken for a tile that failed, or end in a traceback."""
    piece = next((finished / "samples/tiles").glob("*.npy"))
    np.save(piece, np.load(piece)[:, :3])
    command("certify", finished).refuses("samples", "--fresh", code=1)


def test_a_run_that_other_options_planned_is_not_blamed_on_its_crf(
    command: Command, finished: Path
) -> None:
    """An older version knew fewer options: who reads of a CRF would look in the wrong place."""
    plan = json.loads((finished / "plan.json").read_text())
    (finished / "plan.json").write_text(json.dumps(plan | {"request_digest": "0" * 64}))
    command("certify", finished).refuses("another version")


def test_cases_of_a_batch_are_certified_one_by_one(
    command: Command, tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """Their mask stores are deleted: the product itself is read, of scans as well."""
    run(write_archive(tmp_path / "in"), tmp_path / "out", tile=16)
    cases = tmp_path / "out.run/cases"
    for name in ("a", "c"):
        answer = command("certify", cases / name, "--json")
        assert (answer.code, answer.manifest["passed"]) == (0, True), answer.err
    command("certify", tmp_path / "out.run").refuses("batch", "cases")


def test_a_scan_is_certified(command: Command, tmp_path: Path, slim3d: Path, volume: Path) -> None:
    """Its labels lie in another order of axes in the file."""
    output = tmp_path / "o.nii.gz"
    assert command.segment(volume, output, "--tile", 64, model=slim3d).code == 0
    answer = command("certify", f"{output}.run", "--json")
    assert (answer.code, answer.manifest["passed"]) == (0, True), answer.err
    assert answer.manifest["label_disagreement"] == 0
