"""Every run measures its seams; a fault in how tiles are made does not pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import rasterio
import yaml
from scenes import texture, write_raster

from adapters.ledger_file import LedgerFile
from pipeline import certify_sample, segment_tile
from pipeline.domain import Halo, Pass, Reach, Region
from pipeline.models.architecture import Architecture
from pipeline.models.bundle import save_bundle
from pipeline.models.fresh import new_bundle
from pipeline.ports import Block
from workflows.case import Case
from workflows.certifying import certify
from workflows.config import SegmentOptions
from workflows.segmenting import segment

CRF = {"iterations": 2, "smoothness": {"weight": 3, "position": 2}}

Segment = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def raster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """261 x 323 px, odd on both axes, with a hole in its middle."""
    image_CYX = np.stack([texture((261, 323), seed=seed) for seed in (1, 2, 3)])
    image_CYX[1, 120:140, 110:150] = 0
    return write_raster(tmp_path_factory.mktemp("raster") / "scene.tif", image_CYX)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """101 x 37 x 33 voxels: its tiles end before it does along one axis."""
    image_XYZ = texture((33, 37, 101), seed=4).astype(np.int16)
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    nib.save(nib.Nifti1Image(image_XYZ, np.eye(4)), path)
    return path


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that pools over 72 x 40 px."""
    folder = tmp_path_factory.mktemp("pooled")
    architecture = Architecture(
        family="v3", backbone="slim", dims=2, output_stride=8, rates=(1, 2), image_pooling=True
    )
    made = new_bundle(folder / "wide", architecture=architecture, bands=3, classes=4, seed=3)
    weights = made.network().state_dict()
    return save_bundle(folder / "pooled", replace(made, crop=(72, 40)), weights).path


@pytest.fixture
def run(raster: Path, scan: Path, slim: Path, slim3d: Path, tmp_path: Path) -> Segment:
    """``segment`` of the raster or the scan, in this process, in fp32; the manifest."""

    def go(dims: int = 2, *, model: Path | None = None, **changes: Any) -> dict[str, Any]:
        asked: dict[str, Any] = {"backend": "serial", "tracking_uri": "none", "precision": "fp32"}
        source, bundle, suffix, tile = {
            2: (raster, slim, ".tif", 128),
            3: (scan, slim3d, ".nii.gz", 64),
        }[dims]
        options = SegmentOptions(**(asked | {"tile": tile} | changes))
        return segment(source, tmp_path / f"o{suffix}", model=model or bundle, options=options)

    return go


@pytest.mark.parametrize("dims", [2, 3])
def test_a_sound_run_passes_and_its_file_says_so(run: Segment, tmp_path: Path, dims: int) -> None:
    """Who gets the file alone would not know whether its seams were looked at."""
    manifest = run(dims, tile={2: 128, 3: 32}[dims])
    seam = manifest["seam"]
    assert (seam["passed"], seam["exact"], seam["reason"]) == (True, True, "")
    assert seam["windows"] == seam["interior"]["windows"] >= 1
    assert 0 < seam["max_abs_logit"] < 1e-4
    assert seam["label_disagreement"] <= seam["label_disagreement_upper_95"] < 0.01
    assert manifest["tiles"]["done"] == manifest["tiles"]["total"] == {2: 9, 3: 16}[dims]
    kept = json.loads((Path(manifest["output"] + ".run") / "certificate.json").read_text())
    assert {key: kept[key] for key in seam} == json.loads(json.dumps(seam))
    assert [row["kind"] for row in kept["samples"]][:2] == ["seam", "interior"]
    if dims == 2:
        tags = rasterio.open(manifest["output"]).tags()
        assert (tags["TERRAVOX_SEAM_PASSED"], tags["TERRAVOX_SEAM_EXACT"]) == ("true", "true")
        assert float(tags["TERRAVOX_SEAM_MAX_ABS_LOGIT"]) > 0
        assert seam["pixels"] < 64 * 64, "the hole is no part of it"
    else:
        said = nib.load(manifest["output"]).header["descrip"].item().decode()
        assert f"seam {seam['max_abs_logit']:.1e} 0/{seam['pixels']}" in said


@pytest.mark.parametrize("changes", [{"context": "window"}, {"context": "scene"}])
def test_a_network_that_pools_passes(run: Segment, pooled: Path, changes: dict[str, str]) -> None:
    """The window around each place, or the scene's mean, is a part of what a sample must have."""
    manifest = run(model=pooled, tile=64, **changes)
    assert (manifest["seam"]["passed"], manifest["seam"]["exact"]) == (True, True)
    again = certify(manifest["output"] + ".run")
    assert again["max_abs_logit"] == manifest["seam"]["max_abs_logit"]


def test_canonical_windows_pass(run: Segment) -> None:
    """They compute in other pieces, and must say the same."""
    seam = run(windows="canonical", tile=256)["seam"]
    assert (seam["passed"], seam["exact"]) == (True, True)


def test_pooling_over_the_tile_is_stated_and_no_failure(run: Segment, pooled: Path) -> None:
    """It was asked for by name; what it costs must be said."""
    seam = run(model=pooled, tile=64, context="tile")["seam"]
    assert (seam["passed"], seam["exact"]) == (None, False)
    assert seam["max_deviations"] > 1e-2


def test_a_short_halo_states_what_it_costs(run: Segment) -> None:
    """Labels at its seams do differ, and more than within the tiles."""
    seam = run(halo="16")["seam"]
    assert (seam["passed"], seam["exact"]) == (None, False)
    assert seam["label_disagreement"] > 2 * seam["interior"]["label_disagreement"]
    assert seam["label_disagreement_upper_95"] > seam["label_disagreement"] > 0


def test_a_crf_is_measured_before_and_after(run: Segment, tmp_path: Path) -> None:
    """Its own seam, which no halo of the network's takes away, would be called the network's."""
    (tmp_path / "crf.yaml").write_text(yaml.safe_dump({"crf": CRF}))
    seam = run(crf=str(tmp_path / "crf.yaml"))["seam"]
    assert seam["passed"] is True
    assert seam["label_disagreement_before_crf"] == 0
    assert seam["exact"] == (seam["label_disagreement"] == 0)


@pytest.mark.parametrize(("tile", "halo", "exact"), [(128, "16", (False, False)),
                                                     (128, "exact", (True, False)),
                                                     (512, "exact", (True, True))])  # fmt: skip
def test_the_halo_of_the_network_and_the_crf_each_say_whether_they_are_exact(
    run: Segment, tmp_path: Path, tile: int, halo: str, exact: tuple[bool, bool]
) -> None:
    """A CRF that ends with its tile does not make the network's halo a short one."""
    (tmp_path / "crf.yaml").write_text(yaml.safe_dump({"crf": CRF}))
    manifest = run(crf=str(tmp_path / "crf.yaml"), tile=tile, halo=halo)
    assert (manifest["halo"]["exact"], manifest["crf"]["exact"]) == exact


def test_a_mask_put_in_the_wrong_place_fails_with_a_crf_as_well(
    run: Segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CRF may differ at a seam; labels nine pixels off within a tile are no work of its."""
    (tmp_path / "crf.yaml").write_text(yaml.safe_dump({"crf": CRF}))
    sound = segment_tile.to_labels

    def rolled(*args: Any, **named: Any) -> np.ndarray:
        return np.roll(sound(*args, **named), 9, axis=-1)

    monkeypatch.setattr(segment_tile, "to_labels", rolled)
    seam = run(crf=str(tmp_path / "crf.yaml"))["seam"]
    assert seam["passed"] is False
    assert "within tiles" in seam["reason"]


def test_one_tile_says_that_there_is_no_seam(run: Segment) -> None:
    """A scene without seams is not one that nobody measured."""
    manifest = run(tile=512)
    seam = manifest["seam"]
    assert (seam["windows"], seam["passed"], seam["exact"]) == (0, None, True)
    assert seam["max_abs_logit"] is None
    assert "one tile" in seam["reason"]
    assert "TERRAVOX_SEAM_MAX_ABS_LOGIT" not in rasterio.open(manifest["output"]).tags()


def _halo_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks what a region needs is told one stride too little: samples as well."""
    sound = Reach.read

    def short(self: Reach, region: Region, *, shape: tuple[int, ...]) -> Region:
        less = Halo(*(tuple(max(0, n - self.stride) for n in side) for side in _sides(self.halo)))
        return sound(replace(self, halo=less), region, shape=shape)

    monkeypatch.setattr(Reach, "read", short)


def _sides(halo: Halo) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return halo.before, halo.after


def _origin_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are read one pixel too far."""
    sound = segment_tile.read_padded

    def shifted(source: Any, region: Region) -> Block:
        one = (*(0 for _ in region.shape[1:]), 1)
        return sound(
            source,
            Region(
                tuple(a + b for a, b in zip(region.start, one, strict=True)),
                tuple(a + b for a, b in zip(region.stop, one, strict=True)),
            ),
        )

    monkeypatch.setattr(segment_tile, "read_padded", shifted)


def _own_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is scaled by its own mean and deviation: in the samples as well."""

    def own(block: Block, _: Any) -> np.ndarray:
        image_CS = block.image_CS.astype(np.float32)
        axes = tuple(range(1, image_CS.ndim))
        mean, deviation = image_CS.mean(axes, keepdims=True), image_CS.std(axes, keepdims=True)
        return np.where(block.valid_S, (image_CS - mean) / deviation, np.float32(0))

    monkeypatch.setattr(segment_tile, "Normalised", own)
    monkeypatch.setattr(certify_sample, "normalise", own)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("fault", [_halo_short, _origin_off, _own_statistics])
def test_a_planted_fault_fails_aloud(
    run: Segment,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: Callable[[pytest.MonkeyPatch], None],
    dims: int,
) -> None:
    """A halo, an origin or a scaling that is wrong would give seams under a claim of none."""
    fault(monkeypatch)
    manifest = run(dims)
    assert manifest["seam"]["passed"] is False
    assert manifest["seam"]["exact"] is False
    assert manifest["status"] == "done", "the product is there, and says what it is worth"
    assert any("certificate FAILED" in note for note in manifest["notes"])
    assert any("certificate FAILED" in line.getMessage() for line in caplog.records)
    assert "FAILED" in (Path(manifest["output"] + ".run") / "report.html").read_text()


def test_a_plan_whose_halo_is_short_without_saying_so_fails(
    run: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same fault in the pass of the mask alone."""
    sound = Pass.tile

    def short(self: Pass, number: int) -> Any:
        less = replace(self.reach, halo=Halo.uniform(56, ndim=2))
        return sound(replace(self, reach=less), number)

    monkeypatch.setattr(Pass, "tile", short)
    assert run()["seam"]["passed"] is False


def test_samples_that_cannot_be_computed_do_not_make_the_mask_partial(
    run: Segment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The mask is whole; that its certificate is not, is said there."""

    def broken(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(certify_sample.CertifySamples, "compute", broken)
    manifest = run()
    assert (manifest["status"], manifest["tiles"]["failed"]) == ("done", 0)
    assert manifest["seam"]["passed"] is None
    assert "2 of 2 samples" in manifest["seam"]["reason"]
    assert "sample 0 failed: RuntimeError: no such kernel" in caplog.text


def test_a_resumed_run_has_the_samples_of_the_tiles_it_did_not_do_again(
    run: Segment, tmp_path: Path
) -> None:
    """A certificate over a part of the tiles; or every tile would be done again for it."""
    first = run()
    Path(first["output"]).unlink()
    folder = tmp_path / "o.tif.run"
    lost = next((folder / "samples/tiles").glob("*.npy"))
    lost.write_bytes(lost.read_bytes()[:-9])
    before = list(LedgerFile(folder / "ledger", owner="t").history())
    again = run()
    assert again["output_sha256"] == first["output_sha256"]
    assert again["seam"] == first["seam"]
    new = list(LedgerFile(folder / "ledger", owner="t").history())[len(before) :]
    assert [record.status for record in new] == ["failed", "done"]
    assert new[0].key == new[1].key


def test_a_resumed_run_looks_where_it_looked_before(
    run: Segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place that cannot be read for a moment would move samples, and change the file's tags."""
    first = run()
    folder, output = tmp_path / "o.tif.run", Path(first["output"])
    before = json.loads((folder / "plan.json").read_text())["samples"]
    (folder / "manifest.json").unlink()
    output.unlink()
    shutil.rmtree(folder / "ledger")
    monkeypatch.setattr(Case, "labelled", lambda *_: False)
    again = run()
    assert json.loads((folder / "plan.json").read_text())["samples"] == before
    assert again["output_sha256"] == first["output_sha256"]
    assert certify(folder)["passed"] is True


@pytest.mark.parametrize("filled", [True, False])
def test_a_scene_that_is_mostly_nodata_gets_a_verdict_or_the_reason_why_not(
    slim: Path, tmp_path: Path, filled: bool
) -> None:
    """Its middle is empty: whether its seams show would never be known."""
    image_CYX = np.zeros((3, 700, 900))
    if filled:
        image_CYX[:, 40:330, 20:200] = texture((290, 180), seed=1)
    source, options = write_raster(tmp_path / "s.tif", image_CYX), {"backend": "serial"}
    asked = SegmentOptions(tracking_uri="none", precision="fp32", tile=128, **options)
    seam = segment(source, tmp_path / "o.tif", model=slim, options=asked)["seam"]
    if filled:
        assert (seam["passed"], seam["exact"], seam["reason"]) == (True, True, "")
        assert seam["pixels"] > 0
    else:
        assert (seam["passed"], seam["exact"], seam["windows"]) == (None, None, 0)
        assert "all have pixels that get a label" in seam["reason"]
