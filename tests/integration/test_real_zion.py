"""A Landsat scene: a network learns a corner of it, segments it whole, and the papers follow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from real_files import NODATA, SERIAL, assert_same_grid, labels_of
from zion import HELD_BACK, LAND, land_cover, learn_corner, zion_scene

from pipeline.models.bundle import Bundle
from pipeline.training.fit import Recipe
from workflows.config import SegmentOptions
from workflows.segmenting import segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Zion:
    """The scene, its land cover on the same grid, and what was trained on a corner of it."""

    scene: Path
    label_YX: np.ndarray
    bundle: Bundle
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A finished run, opened from the outside."""

    output: Path
    manifest: dict[str, Any]
    tracking_uri: str


@pytest.fixture(scope="module")
def zion(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Zion:
    recipe = Recipe(
        steps=160,
        optimizer="adamw",
        lr=3e-3,
        weight_decay=1e-2,
        precision="fp32",
        seed=0,
        threads=1,
        frozen_steps=60,
        norm_batches=10,
    )
    out = tmp_path_factory.mktemp("zion-model") / "zion"
    bundle, losses = learn_corner(data, out, recipe=recipe)
    scene, label_YX = zion_scene(data), land_cover(data)
    return Zion(scene=scene, label_YX=label_YX, bundle=bundle, losses=losses)


@pytest.fixture(scope="module")
def zion_run(zion: Zion, cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("zion")
    uri = f"sqlite:///{folder / 'tracking.db'}"
    asked = SegmentOptions(
        workers=2, tile=512, precision="fp32", tracking_uri=uri, experiment="zion"
    )
    output = folder / "mask.tif"
    manifest = segment(zion.scene, output, model=zion.bundle.path, options=asked)
    return Run(output=output, manifest=manifest, tracking_uri=uri)


def test_the_loss_falls_while_a_corner_of_zion_is_learned(zion: Zion) -> None:
    """A network that did not learn would make every later figure a matter of luck."""
    assert np.mean(zion.losses[-20:]) < 0.6 * np.mean(zion.losses[:5])


def test_the_part_of_zion_that_was_not_trained_on_beats_its_majority_class(
    zion: Zion, zion_run: Run
) -> None:
    """Measured on the file: shifted, mirrored or renumbered labels would lose the lead."""
    truth, found = zion.label_YX[HELD_BACK], labels_of(zion_run.output)[HELD_BACK]
    known = truth != NODATA
    majority = np.bincount(truth[known]).max() / known.sum()
    accuracy = float((found[known] == truth[known]).mean())
    print(f"accuracy {accuracy:.3f}, majority class {majority:.3f}")
    assert accuracy > majority + 0.08
    assert (found[::-1][known] == truth[known]).mean() < accuracy - 0.08


def test_the_mask_of_zion_is_a_cog_on_the_grid_of_the_vrt(zion: Zion, zion_run: Run) -> None:
    """A mask that is off the grid cannot be laid over the scene."""
    assert_same_grid(zion_run.output, zion.scene)
    assert zion_run.manifest["status"] == "done"
    assert zion_run.manifest["tiles"]["done"] == 6


def test_the_areas_of_zion_are_those_of_the_file_and_add_up_to_the_scene(
    zion: Zion, zion_run: Run
) -> None:
    """The table is what goes into a report; it must be the file's."""
    labels, rows = labels_of(zion_run.output), zion_run.manifest["classes"]
    assert {row["id"]: row["pixels"] for row in rows} == {
        number: int((labels == number).sum()) for number in LAND
    }
    assert sum(row["area_m2"] for row in rows) == labels.size * 900.0
    assert {"barren", "forest", "shrubland"} <= {r["name"] for r in rows if r["pixels"] > 10_000}
    assert zion_run.manifest["nodata_pixels"] == 0


def test_the_run_over_zion_can_be_looked_up_in_mlflow(zion: Zion, zion_run: Run) -> None:
    """What is not in the tracker did not happen, as far as the next person knows."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=zion_run.tracking_uri)
    run = client.get_run(zion_run.manifest["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["precision.name"] == "fp32"
    assert run.data.params["tile"] == "(512, 512)"
    assert run.data.tags["fingerprint"] == zion_run.manifest["fingerprint"]
    assert run.data.tags["model_digest"] == zion.bundle.digest
    areas = {row["name"]: row["area_m2"] for row in zion_run.manifest["classes"]}
    assert {name: run.data.metrics[f"area_m2/{name}"] for name in areas} == areas
    assert client.get_metric_history(run.info.run_id, "mpx_per_s")
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    papers = {"manifest.json", "plan.json", "report.html", "quicklook.png", "certificate.json"}
    assert names == papers


def test_the_quicklook_of_zion_shows_the_classes_where_the_mask_has_them(zion_run: Run) -> None:
    """A picture that is mirrored, or in other colours, misleads whoever looks first."""
    from mlflow.artifacts import download_artifacts

    path = download_artifacts(
        run_id=zion_run.manifest["mlflow_run_id"],
        artifact_path="quicklook.png",
        tracking_uri=zion_run.tracking_uri,
    )
    picture = np.asarray(Image.open(path).convert("RGB")).astype(float)
    labels = np.asarray(Image.fromarray(labels_of(zion_run.output)).resize(picture.shape[1::-1], 0))
    forest, barren = picture[labels == 4].mean(axis=0), picture[labels == 3].mean(axis=0)
    assert barren.mean() > forest.mean() + 40  # bare rock is bright, in the image and in the legend


def test_a_cloud_in_one_band_of_zion_is_nodata_and_nothing_else_is(
    zion: Zion, zion_run: Run, tmp_path: Path
) -> None:
    """65535 in any band is no measurement; far from it nothing may change."""
    folder, hole = zion.scene.parent, (slice(300, 420), slice(480, 640))
    with rasterio.open(folder / "landsat_b4.tif") as band:
        values, profile = band.read(1), band.profile
    values[hole] = 65535
    with rasterio.open(tmp_path / "cloudy.tif", "w", **profile) as band:
        band.write(values, 1)
    text = zion.scene.read_text().replace("landsat_b4.tif", str(tmp_path / "cloudy.tif"))
    text = text.replace(">landsat_b", f">{folder.resolve()}/landsat_b")
    cloudy = tmp_path / "cloudy.vrt"
    cloudy.write_text(text.replace('relativeToVRT="1"', 'relativeToVRT="0"'))
    output = tmp_path / "mask.tif"
    asked = SERIAL.model_copy(update={"tile": 512})
    segment(cloudy, output, model=zion.bundle.path, options=asked)
    labels, clear = labels_of(output), labels_of(zion_run.output)
    assert (labels[hole] == NODATA).all()
    assert (labels == NODATA).sum() == 120 * 160
    far = np.ones(labels.shape, bool)
    far[300 - 64 : 420 + 64, 480 - 64 : 640 + 64] = False
    assert (labels[far] != clear[far]).sum() <= 5  # the last bits of a sum, at a near tie
