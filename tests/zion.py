"""A Landsat scene and its land cover, and a network that learns a corner of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from real_files import NODATA, slim_network

from pipeline.models.bundle import Bundle, ClassInfo, InputSpec, Scaling, save_bundle
from pipeline.training.crops import CropSampler, CropSpec, Sample
from pipeline.training.fit import Recipe, StepDone, fit

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


def zion_scene(data: Path) -> Path:
    """Blue, green, red and near infrared, 1000 x 1128 px at 30 m; all of it is valid."""
    return data / "geo" / "zion_landsat8" / "landsat_b2345.vrt"


def land_cover(data: Path) -> np.ndarray:
    """(Y, X) uint8 on the scene's grid, nearest; the file lies on another."""
    scene = zion_scene(data)
    with rasterio.open(scene) as grid, rasterio.open(scene.with_name("nlcd.tif")) as cover:
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


def learn_corner(data: Path, out: Path, *, recipe: Recipe) -> tuple[Bundle, tuple[float, ...]]:
    """The slim network, trained on the corner and written to ``out``, and the loss of each step."""
    sample, scaling = _corner_sample(data)
    network, losses = slim_network(2, bands=4, classes=len(LAND), seed=0), []
    spec = CropSpec(crop=(64, 64), batch=8, flips=(0, 1), ignore_index=NODATA)

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
    return save_bundle(out, bundle, network.state_dict()), tuple(losses)


def _corner_sample(data: Path) -> tuple[Sample, Scaling]:
    with rasterio.open(zion_scene(data)) as file:
        image_CYX = file.read()[(slice(None), *CORNER)].astype(np.float32)
    mean_C, std_C = image_CYX.mean(axis=(1, 2)), image_CYX.std(axis=(1, 2))
    normal_CYX = (image_CYX - mean_C[:, None, None]) / std_C[:, None, None]
    corner_YX = land_cover(data)[CORNER]
    index_YX = np.where(corner_YX == NODATA, NODATA, corner_YX - 1).astype(np.uint8)
    scaling = Scaling(type="z-score", mean=tuple(mean_C.tolist()), std=tuple(std_C.tolist()))
    return Sample(normal_CYX, index_YX), scaling
