"""Promise 1: the same plan gives the same bytes, whoever runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml

from adapters.ledger_file import LedgerFile
from pipeline.models.bundle import load_bundle
from workflows.config import SegmentOptions
from workflows.run_dir import file_digest
from workflows.segmenting import segment

CRF = {
    "iterations": 3,
    "smoothness": {"weight": 3, "position": 3},
    "appearance": {"weight": 4, "position": 10, "value": 13, "bands": ["1"], "range": [0, 2000]},
}


def options(**changes: object) -> SegmentOptions:
    return SegmentOptions(
        **({"tracking_uri": "none", "precision": "fp32", "crf": "off"} | changes)  # type: ignore[arg-type]
    )


def pids(output: Path) -> dict[str, int]:
    """Workers in the ledger and how often each loaded the model."""
    records = LedgerFile(Path(f"{output}.run/ledger"), owner="test").records()
    return {record.worker: record.loads for record in records.values()}


@pytest.fixture(scope="module")
def crf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("crf") / "crf.yaml"
    path.write_text(yaml.safe_dump({"crf": CRF}))
    return path


@pytest.mark.parametrize("with_crf", [False, True], ids=["crf-off", "crf-on"])
def test_a_raster_is_the_same_file_from_serial_one_actor_and_two(
    scene: Path, slim: Path, crf_file: Path, tmp_path: Path, cluster: None, with_crf: bool
) -> None:
    """Order, retries or a second actor leaking into the result would break every resume."""
    crf = str(crf_file) if with_crf else "off"
    digests = {}
    for name, backend, workers in (("a", "serial", None), ("b", "ray", 1), ("c", "ray", 2)):
        output = tmp_path / f"{name}.tif"
        asked = options(backend=backend, workers=workers, crf=crf, tile=128)
        manifest = segment(scene, output, model=slim, options=asked)
        digests[name] = manifest["output_sha256"], file_digest(output)
    assert len(set(digests.values())) == 1
    assert set(pids(tmp_path / "b.tif").values()) == {2}, "once in stages, once whole"
    assert len(pids(tmp_path / "c.tif")) == 2
    assert set(pids(tmp_path / "c.tif").values()) <= {1, 2}


@pytest.mark.parametrize("with_crf", [False, True], ids=["crf-off", "crf-on"])
def test_a_volume_is_the_same_file_from_serial_and_two_actors(
    volume: Path, slim3d: Path, crf_file: Path, tmp_path: Path, cluster: None, with_crf: bool
) -> None:
    """The same for three axes and the NIfTI writer."""
    crf = str(crf_file) if with_crf else "off"
    for name, backend, workers in (("a", "serial", None), ("c", "ray", 2)):
        output = tmp_path / f"{name}.nii.gz"
        asked = options(backend=backend, workers=workers, crf=crf, tile=32)
        segment(volume, output, model=slim3d, options=asked)
    assert file_digest(tmp_path / "a.nii.gz") == file_digest(tmp_path / "c.nii.gz")


def test_a_finished_run_is_left_alone_and_another_request_is_refused(
    scene: Path, slim: Path, tmp_path: Path
) -> None:
    """A rerun that computes again wastes a night; one that overwrites another result loses it."""
    from pipeline.errors import PlanError

    output, asked = tmp_path / "o.tif", options(backend="serial", tile=512)
    first = segment(scene, output, model=slim, options=asked)
    before = output.stat().st_mtime_ns
    again = segment(scene, output, model=slim, options=asked)
    assert output.stat().st_mtime_ns == before
    assert again == json.loads(json.dumps(first))
    with pytest.raises(PlanError, match="--fresh"):
        segment(scene, output, model=slim, options=options(backend="serial", tile=256))
    fresh = options(backend="serial", tile=256, fresh=True)
    assert segment(scene, output, model=slim, options=fresh)["tile"] == (256, 256)


def test_the_mask_lies_on_the_source_grid_and_nodata_is_no_class(
    scene: Path, slim: Path, tmp_path: Path
) -> None:
    """A shifted or shrunken mask is worse than none; a class in the holes is a lie."""
    output = tmp_path / "o.tif"
    manifest = segment(scene, output, model=slim, options=options(backend="serial", tile=256))
    with rasterio.open(scene) as source, rasterio.open(output) as mask:
        assert (mask.crs, mask.transform, mask.shape) == (
            source.crs,
            source.transform,
            source.shape,
        )
        labels, valid = mask.read(1), (source.read() != 0).all(axis=0)
        assert mask.nodata == 255
        assert np.array_equal(labels == 255, ~valid)
        assert mask.tags()["TERRAVOX_FINGERPRINT"] == manifest["fingerprint"]
        assert mask.tags()["TERRAVOX_MODEL_DIGEST"] == load_bundle(slim).digest
    assert sum(row["pixels"] for row in manifest["classes"]) == valid.sum()
    assert manifest["classes"][0]["area_m2"] == manifest["classes"][0]["pixels"] * 100.0


def test_scores_are_kept_when_asked_and_agree_with_the_mask(
    scene: Path, slim: Path, tmp_path: Path
) -> None:
    """Scores of another crop or order than the mask would mislead whoever refines them."""
    import zarr

    output = tmp_path / "o.tif"
    asked = options(backend="serial", tile=256, scores="float16")
    segment(scene, output, model=slim, options=asked)
    scores = zarr.open_array(f"{output}.run/scores.zarr", mode="r")[:]
    with rasterio.open(output) as mask:
        labels = mask.read(1)
    valid = labels != 255
    assert np.allclose(scores.sum(axis=0)[valid], 1.0, atol=5e-3)
    assert not scores[:, ~valid].any()
    best = np.sort(scores, axis=0)
    clear = valid & (best[-1] - best[-2] > 2e-3)
    assert np.array_equal(scores.argmax(axis=0)[clear], labels[clear])


def test_a_product_that_was_deleted_is_made_again_from_the_store(
    scene: Path, slim: Path, tmp_path: Path
) -> None:
    """Tiles are not computed twice, and the manifest never speaks of a file that is not there."""
    output, asked = tmp_path / "o.tif", options(backend="serial", tile=256)
    first = segment(scene, output, model=slim, options=asked)
    lines = LedgerFile(Path(f"{output}.run/ledger"), owner="test")
    before = len(list(lines.history()))
    output.unlink()
    again = segment(scene, output, model=slim, options=asked)
    assert again["output_sha256"] == first["output_sha256"] == file_digest(output)
    assert len(list(lines.history())) == before


def test_lost_scores_are_made_again(scene: Path, slim: Path, tmp_path: Path) -> None:
    """A resumed run that trusted the mask alone would leave zeros where scores were."""
    import shutil

    import zarr

    output = tmp_path / "o.tif"
    asked = options(backend="serial", tile=256, scores="uint8")
    segment(scene, output, model=slim, options=asked)
    before = zarr.open_array(f"{output}.run/scores.zarr", mode="r")[:]
    output.unlink()
    shutil.rmtree(f"{output}.run/scores.zarr/c")
    segment(scene, output, model=slim, options=asked)
    after = zarr.open_array(f"{output}.run/scores.zarr", mode="r")[:]
    assert before.any()
    assert np.array_equal(before, after)
