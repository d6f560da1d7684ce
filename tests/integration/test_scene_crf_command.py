"""``terravox refine`` with one lattice under all tiles: no tiling shows, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import rasterio
import yaml
from command import Command
from real_files import assert_same_grid, labels_of
from scenes import noisy, texture, write_raster

from adapters.ledger_file import LedgerFile
from pipeline.crf.dense import refine as refine_array
from pipeline.crf.engine import engine_named, installed
from pipeline.crf.params import CrfParams
from pipeline.ports import Block
from workflows.config import RefineOptions
from workflows.refining import refine

if not installed("native"):
    pytest.skip("the native CRF engine was not built here", allow_module_level=True)

SHAPE = (150, 190)
BANDS = ["1", "2"]
CRF = {
    "scope": "scene",
    "iterations": 4,
    "smoothness": {"weight": 3, "position": 3},
    "appearance": {"weight": 4, "position": 25, "value": 13, "bands": BANDS, "range": [0, 2000]},
}


def of_the_whole(image_CS: np.ndarray, prob_KS: np.ndarray, valid_S: np.ndarray) -> np.ndarray:
    """Labels of the CRF over the image in one piece, by the engine without tiles."""
    tile = {key: value for key, value in CRF.items() if key != "scope"}
    refined_KS = refine_array(
        prob_KS,
        block=Block(image_CS, valid_S),
        origin=(0,) * valid_S.ndim,
        params=CrfParams.from_mapping(tile).resolve((1,) * valid_S.ndim, unit="px", channels=BANDS),
        engine=engine_named("native", device="cpu", threads=1),
    )
    return np.where(valid_S, refined_KS.argmax(0), 255)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with a nodata corner that is larger than a tile, scores, and a CRF."""
    folder = tmp_path_factory.mktemp("scene")
    image_CYX = np.stack([texture(SHAPE, seed=seed) for seed in (1, 2)])
    image_CYX[:, :40, :50] = 0
    write_raster(folder / "image.tif", image_CYX)
    write_raster(folder / "scores.tif", noisy(image_CYX[0]), nodata=None)
    (folder / "crf.yaml").write_text(yaml.safe_dump({"crf": CRF}))
    return folder


@pytest.fixture
def terravox(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys, Path())


def line(folder: Path, output: Path, *more: object) -> list[object]:
    suffix = "".join(output.suffixes)
    return [
        "refine", folder / f"image{suffix}", "--scores", folder / f"scores{suffix}",
        "-o", output, "--crf", folder / "crf.yaml", "--tracking-uri", "none", *more,
    ]  # fmt: skip


def test_any_tiling_gives_the_labels_of_the_image_in_one_piece(made, terravox, tmp_path):
    """The seams that are left by a lattice for each tile would be back, and called absent."""
    with rasterio.open(made / "image.tif") as file:
        image_CYX = file.read()
    with rasterio.open(made / "scores.tif") as file:
        prob_KYX = file.read()
    wanted_YX = of_the_whole(image_CYX, prob_KYX, image_CYX.all(axis=0))
    assert (wanted_YX != prob_KYX.argmax(0)).mean() > 0.1
    for tile, tiles, skipped in ((256, 1, 0), (64, 9, 0), (32, 30, 1)):
        output = tmp_path / f"{tile}.tif"
        answer = terravox(*line(made, output, "--tile", tile, "--json", "--backend", "serial"))
        assert answer.code == 0, answer.err
        np.testing.assert_array_equal(labels_of(output), wanted_YX)
        assert_same_grid(output, made / "image.tif")
        manifest = answer.manifest
        assert manifest["tiles"] == {
            "total": tiles, "done": tiles, "failed": 0, "skipped": skipped,
        }  # fmt: skip
        assert manifest["nodata_pixels"] == 2000
        assert (manifest["crf"]["scope"], manifest["crf"]["engine"]) == ("scene", "native")
        lattice = manifest["crf"]["lattice"]
        assert lattice["vertices"] > 1000
        assert (lattice["sent_bytes"] > 0) == (tiles > 1)
        seam = manifest["seam"]
        assert (seam["exact"], seam["label_disagreement"]) == (True, None)
        assert "one lattice" in seam["reason"]
        assert "each is visited 6 times" in answer.err
        assert not (tmp_path / f"{tile}.tif.run" / "lattice").exists()


def test_a_tile_of_its_own_would_give_other_labels(made, terravox, tmp_path):
    """The test above could not fail where a lattice for each tile gave the same."""
    tile = {key: value for key, value in CRF.items() if key != "scope"} | {"halo": 8}
    (tmp_path / "tile.yaml").write_text(yaml.safe_dump(tile))
    for crf, name in ((made / "crf.yaml", "scene"), (tmp_path / "tile.yaml", "tile")):
        answer = terravox(
            *line(made, tmp_path / f"{name}.tif", "--tile", 64, "--crf", crf, "--backend", "serial")
        )
        assert answer.code == 0, answer.err
    assert (labels_of(tmp_path / "scene.tif") != labels_of(tmp_path / "tile.tif")).any()


def test_a_volume_in_tiles_is_the_volume_in_one_piece(terravox, tmp_path):
    """A position taken along another axis would show in three of them alone."""
    shape = (22, 26, 14)
    contrasts = np.stack([texture(shape, seed=s) for s in (5, 6)], -1).astype(np.int16)
    prob_KS = noisy(contrasts[..., 0])
    affine = np.diag([1.0, 1, 1, 1])
    nib.save(nib.Nifti1Image(contrasts, affine), tmp_path / "image.nii.gz")
    nib.save(nib.Nifti1Image(np.moveaxis(prob_KS, 0, -1), affine), tmp_path / "scores.nii.gz")
    (tmp_path / "crf.yaml").write_text(yaml.safe_dump(CRF))
    answer = terravox(
        *line(tmp_path, tmp_path / "mask.nii.gz", "--tile", 10, "--backend", "serial")
    )
    assert answer.code == 0, answer.err
    found_XYZ = np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj)
    wanted_ZYX = of_the_whole(
        np.moveaxis(contrasts, -1, 0).transpose(0, 3, 2, 1),
        prob_KS.transpose(0, 3, 2, 1),
        np.ones(shape[::-1], bool),
    )
    np.testing.assert_array_equal(found_XYZ.transpose(2, 1, 0), wanted_ZYX)


def test_any_number_of_actors_gives_the_same_bytes(made, terravox, tmp_path):
    """Sums that depend on who adds what first would make another file of each run."""
    seen = set()
    for more in (("--backend", "serial"), ("--workers", 1), ("--workers", 2)):
        output = tmp_path / f"{more[1]}.tif"
        answer = terravox(*line(made, output, "--tile", 64, "--json", *more))
        assert answer.code == 0, answer.err
        seen.add(answer.manifest["output_sha256"])
    assert len(seen) == 1


def test_a_run_that_is_killed_in_a_round_is_finished_by_the_same_command(
    made, terravox, caplog, tmp_path
):
    """Tiles that heard half of a round would be taken for those that heard the whole."""
    once = terravox(*line(made, tmp_path / "once.tif", "--tile", 48, "--json"))
    assert once.code == 0, once.err
    output = tmp_path / "killed.tif"
    script = Path(sys.executable).with_name("terravox")
    process = subprocess.Popen(
        [str(part) for part in (script, *line(made, output, "--tile", 48, "--backend", "serial"))],
        env=os.environ | {"HOME": str(tmp_path)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    ledger, deadline = Path(f"{output}.run/ledger"), time.monotonic() + 60
    while len(LedgerFile(ledger, owner="test").records()) < 40:  # of 6 rounds of 16
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(LedgerFile(ledger, owner="test").records())
    assert kept < 96
    assert not output.exists()
    again = terravox(*line(made, output, "--tile", 48, "--json"))
    assert again.code == 0, again.err
    assert f"{kept} of 96 tiles are done" in caplog.text
    assert again.manifest["output_sha256"] == once.manifest["output_sha256"]


def test_rounds_start_over_where_what_was_told_is_gone(made, caplog, tmp_path):
    """A run directory that was copied in part would never come to an end."""
    options = RefineOptions(tile=64, tracking_uri="none", backend="serial")
    asked = {"scores": made / "scores.tif", "crf": made / "crf.yaml", "options": options}
    once = refine(made / "image.tif", tmp_path / "once.tif", **asked)
    asks = count()
    part = refine(made / "image.tif", tmp_path / "mask.tif", **asked, stop=lambda: next(asks) > 30)
    assert part["status"] == "interrupted"
    assert not (tmp_path / "mask.tif").exists()
    told = sorted(path.name for path in (tmp_path / "mask.tif.run" / "lattice").iterdir())
    assert told == ["0", "2", "3"]
    shutil.rmtree(tmp_path / "mask.tif.run" / "lattice" / "2")
    rest = refine(made / "image.tif", tmp_path / "mask.tif", **asked)
    assert "all rounds are done again" in caplog.text
    assert rest["output_sha256"] == once["output_sha256"]


def test_no_run_takes_more_than_was_planned(made, tmp_path):
    """Who asks what a scene will take would be told too little."""
    for tile in (32, 64, 256):
        output = tmp_path / f"{tile}.tif"
        options = RefineOptions(tile=tile, tracking_uri="none", backend="serial")
        found = refine(
            made / "image.tif", output, scores=made / "scores.tif", crf=made / "crf.yaml",
            options=options,
        )  # fmt: skip
        plan = json.loads(Path(f"{output}.run/plan.json").read_text())["lattice"]
        lattice = found["crf"]["lattice"]
        assert plan["vertices"] / 2 < lattice["vertices"] <= plan["vertices"]
        if tile < 256:
            assert plan["sent_bytes"] / 4 < lattice["sent_bytes"] <= plan["sent_bytes"]


def test_a_scene_without_a_valid_pixel_is_nodata(terravox, made, tmp_path):
    """There is no lattice then, whose vertices the plan and the last pass could ask for."""
    empty = np.zeros((2, 40, 50), np.uint16)
    write_raster(tmp_path / "image.tif", empty)
    write_raster(tmp_path / "scores.tif", noisy(empty[0]), nodata=None)
    (tmp_path / "crf.yaml").write_text((made / "crf.yaml").read_text())
    answer = terravox(*line(tmp_path, tmp_path / "mask.tif", "--tile", 32, "--backend", "serial"))
    assert answer.code == 0, answer.err
    assert (labels_of(tmp_path / "mask.tif") == 255).all()


def test_segment_gives_what_refine_makes_of_its_scores(scene, slim, terravox, tmp_path):
    """The two ways would not say the same, or number the classes anew."""
    crf = CRF | {"appearance": CRF["appearance"] | {"bands": ["1", "2", "3"]}}
    (tmp_path / "crf.yaml").write_text(yaml.safe_dump(crf))
    given = ("--model", slim, "--tile", 64, "--backend", "serial", "--tracking-uri", "none")
    asked = terravox(
        "segment", scene, "-o", tmp_path / "raw.tif", *given, "--crf", tmp_path / "crf.yaml",
        "--scores", "float16",
    )  # fmt: skip
    asked.refuses("--crf off --scores float16")
    raw = terravox(
        "segment", scene, "-o", tmp_path / "raw.tif", *given, "--crf", "off",
        "--scores", "float16", "--json",
    )  # fmt: skip
    assert raw.code == 0, raw.err
    refined = ("--crf", tmp_path / "crf.yaml", "--tracking-uri", "none", "--json")
    scores = ("--scores", tmp_path / "raw.tif.run")
    answer = terravox("refine", scene, *scores, "-o", tmp_path / "mask.tif", *refined)
    assert answer.code == 0, answer.err
    at_once = terravox(
        "segment", scene, "-o", tmp_path / "once.tif", *given, "--crf", tmp_path / "crf.yaml",
        "--json",
    )  # fmt: skip
    assert at_once.code == 0, at_once.err
    np.testing.assert_array_equal(
        labels_of(tmp_path / "once.tif"), labels_of(tmp_path / "mask.tif")
    )
    found = at_once.manifest
    assert found["classes"] == answer.manifest["classes"]
    assert (found["crf"]["scope"], found["crf"]["lattice"]["sent_bytes"] > 0) == ("scene", True)
    assert found["seam"] == raw.manifest["seam"]
    assert found["seam"]["passed"]
    assert not (tmp_path / "once.tif.run" / "lattice").exists()
    assert terravox("certify", tmp_path / "once.tif.run").code == 0
    names = [(row["id"], row["name"], row["color"]) for row in raw.manifest["classes"]]
    assert names == [(row["id"], row["name"], row["color"]) for row in answer.manifest["classes"]]
    before_YX, after_YX = labels_of(tmp_path / "raw.tif"), labels_of(tmp_path / "mask.tif")
    np.testing.assert_array_equal(before_YX == 255, after_YX == 255)
    assert 0.001 < (before_YX != after_YX).mean() < 0.5
    other = write_raster(tmp_path / "other.tif", np.ones((3, 9, 9), np.uint16))
    answer = terravox("refine", other, *scores, "-o", tmp_path / "no.tif", *refined)
    answer.refuses("is another image")


def test_segment_is_finished_by_the_same_command_wherever_it_was_killed(
    scene, slim, terravox, tmp_path
):
    """Scores or sums of half a pass would be taken for those of the whole."""
    crf = CRF | {"appearance": CRF["appearance"] | {"bands": ["1", "2", "3"]}, "iterations": 2}
    (tmp_path / "crf.yaml").write_text(yaml.safe_dump(crf))
    given = (
        "--model", slim, "--tile", 64, "--backend", "serial", "--tracking-uri", "none",
        "--crf", tmp_path / "crf.yaml",
    )  # fmt: skip
    once = terravox("segment", scene, "-o", tmp_path / "once.tif", *given, "--json")
    assert once.code == 0, once.err
    tiles = once.manifest["tiles"]["total"]
    script, output = Path(sys.executable).with_name("terravox"), tmp_path / "killed.tif"
    command = [str(part) for part in (script, "segment", scene, "-o", output, *given)]
    for share in (0.5, 1.5, 4.5):  # in the network's pass, in the first round, in the last
        process = subprocess.Popen(
            command, env=os.environ | {"HOME": str(tmp_path)}, stderr=subprocess.DEVNULL
        )
        ledger, deadline = Path(f"{output}.run/ledger"), time.monotonic() + 90
        while len(LedgerFile(ledger, owner="test").records()) < share * tiles:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not output.exists()
    again = terravox("segment", scene, "-o", output, *given, "--json")
    assert again.code == 0, again.err
    assert again.manifest["output_sha256"] == once.manifest["output_sha256"]
    output.unlink()  # what led to the mask is gone, and of no use
    again = terravox("segment", scene, "-o", output, *given, "--json")
    assert again.manifest["output_sha256"] == once.manifest["output_sha256"]
    assert again.manifest["stages"] == {}


@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        ({"halo": 128}, (), "crf.halo: 128 asked with scope scene"),
        ({"engine": "torch"}, (), "crf.engine: 'torch' asked with scope scene"),
        ({"scope": "world"}, (), "one of tile, scene is needed"),
        ({}, ("--device", "cuda"), "--device cuda asked"),
        ({}, ("--memory-budget", "1GB"), "--memory-budget 1.0 GB asked"),
    ],
)
def test_what_one_lattice_cannot_do_is_refused(made, terravox, tmp_path, change, more, words):
    """A halo, an engine or workers that nobody heeds would be believed to have been used."""
    (tmp_path / "crf.yaml").write_text(yaml.safe_dump(CRF | change))
    answer = terravox(*line(made, tmp_path / "mask.tif", "--crf", tmp_path / "crf.yaml", *more))
    answer.refuses(words)
    assert not (tmp_path / "mask.tif.run").exists()
