"""A Landsat scene: a network learns a corner of it, segments it whole, and the papers follow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from real_files import NODATA, SERIAL, assert_same_grid, labels_of, slim_network

from pipeline.models.bundle import Bundle, ClassInfo, InputSpec, Scaling, save_bundle
from pipeline.training.crops import CropSampler, CropSpec, Sample
from pipeline.training.fit import Recipe, StepDone, fit
from workflows.config import SegmentOptions
from workflows.segment import segment

# Classes of nlcd.tif and the colours of the land cover's own legend, more or less.
LAND = {
    1: ("water", "#476ba0"),
    2: ("developed", "#d60000"),
    3: ("barren", "#b2ada3"),
    4: ("forest", "#1c6330"),
    5: ("shrubland", "#ccba7c"),
    6: ("herbaceous", "#e2e2c1"),
    7: ("cultivated", "#aa6c28"),
    8: ("wetlands", "#70a3ba"),
}
CORNER = (slice(0, 600), slice(0, 700))
HELD_BACK = (slice(700, 1000), slice(0, 1128))
"""100 rows from the corner: farther than the network sees."""


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


def land_cover(folder: Path, scene: Path) -> np.ndarray:
    """(Y, X) uint8 on the scene's grid, nearest; the file lies on another."""
    with rasterio.open(scene) as grid, rasterio.open(folder / "nlcd.tif") as cover:
        warped = WarpedVRT(
            cover,
            crs=grid.crs,
            transform=grid.transform,
            width=grid.width,
            height=grid.height,
            resampling=Resampling.nearest,
        )
        with warped:
            label_YX: np.ndarray = warped.read(1)
    return label_YX


def corner_sample(scene: Path, label_YX: np.ndarray) -> tuple[Sample, Scaling]:
    with rasterio.open(scene) as file:
        image_CYX = file.read()[(slice(None), *CORNER)].astype(np.float32)
    mean_C, std_C = image_CYX.mean(axis=(1, 2)), image_CYX.std(axis=(1, 2))
    normal_CYX = (image_CYX - mean_C[:, None, None]) / std_C[:, None, None]
    corner_YX = label_YX[CORNER]
    index_YX = np.where(corner_YX == NODATA, NODATA, corner_YX - 1).astype(np.uint8)
    scaling = Scaling(type="z-score", mean=tuple(mean_C.tolist()), std=tuple(std_C.tolist()))
    return Sample(normal_CYX, index_YX), scaling


@pytest.fixture(scope="module")
def zion(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Zion:
    folder, losses = data / "geo" / "zion_landsat8", []
    scene = folder / "landsat_b2345.vrt"
    label_YX = land_cover(folder, scene)
    sample, scaling = corner_sample(scene, label_YX)
    network = slim_network(2, bands=4, classes=len(LAND), seed=0)
    spec = CropSpec(crop=(64, 64), batch=8, flips=(0, 1), ignore_index=NODATA)
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

    def note(done: StepDone) -> None:
        losses.append(done.loss)

    fit(network, CropSampler([sample], spec=spec), recipe=recipe, on_step=note)
    bundle = Bundle(
        name="zion",
        version=1,
        architecture=network.architecture,
        classes=tuple(ClassInfo(id=i, name=n, color=c) for i, (n, c) in LAND.items()),
        ignore_index=NODATA,
        input=InputSpec(
            bands=("blue", "green", "red", "nir"),
            dtype="uint16",
            scaling=scaling,
            pixel_size_m=30.0,
        ),
        crop=spec.crop,
    )
    saved = save_bundle(
        tmp_path_factory.mktemp("zion-model") / "zion", bundle, network.state_dict()
    )
    return Zion(scene=scene, label_YX=label_YX, bundle=saved, losses=tuple(losses))


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
