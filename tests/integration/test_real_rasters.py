"""Rasters as people have them: collars, alpha, mask files, NaN, no CRS, rotation, degrees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from real_files import NODATA, SERIAL, assert_same_grid, labels_of

from workflows.model import create
from workflows.segmenting import segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Raster:
    """A real file, and which of its pixels were never measured, read without our code."""

    name: str
    bands: int
    missing: Callable[[Any], np.ndarray]
    """Of an open dataset, (Y, X) bool."""

    note: str = ""
    """What the run must say about it."""


def nothing(file: Any) -> np.ndarray:
    return np.zeros(file.shape, bool)


RASTERS = (
    Raster(
        name="rasterio_tests/RGB.byte.tif",
        bands=3,
        missing=lambda file: (file.read() == 0).any(axis=0),
    ),
    Raster(
        name="rasterio_tests/RGB2.byte.tif",
        bands=3,
        missing=lambda file: file.read_masks(1) == 0,
    ),
    Raster(name="rasterio_tests/cogeo.tif", bands=3, missing=lambda file: file.read_masks(1) == 0),
    Raster(
        name="rasterio_tests/alpha.tif",
        bands=3,
        missing=lambda file: file.read(4) == 0,
        note="band 4 is alpha",
    ),
    Raster(name="rasterio_tests/rotated.tif", bands=1, missing=nothing, note="rotated affine"),
    Raster(
        name="rasterio_tests/float_nan.tif",
        bands=1,
        missing=lambda file: np.isnan(file.read(1)),
        note="no CRS",
    ),
    Raster(name="rasterio_tests/world.rgb.tif", bands=3, missing=nothing),
    Raster(name="ftw_sentinel2_austria/inference-img.tif", bands=8, missing=nothing),
    Raster(name="naip_virginia/NAIP-VA-b2.tiff", bands=1, missing=lambda file: file.read(1) == 255),
)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The slim network for a number of bands."""
    folder = tmp_path_factory.mktemp("untrained")

    @cache
    def of(bands: int) -> Path:
        bundle = create(
            output=folder / f"bands-{bands}",
            family="v3",
            backbone="slim",
            dims=2,
            bands=bands,
            classes=4,
            output_stride=None,
            seed=3,
        )
        return bundle.path

    return of


@pytest.mark.parametrize("raster", RASTERS, ids=lambda raster: Path(raster.name).stem)
def test_a_real_raster_keeps_its_grid_and_what_was_not_measured_is_nodata(
    data: Path, untrained: Callable[[int], Path], tmp_path: Path, raster: Raster
) -> None:
    """Collars, alpha, mask files, NaN, no CRS, rotation, degrees: each breaks something else."""
    source, output = data / "geo" / raster.name, tmp_path / "mask.tif"
    asked = SERIAL.model_copy(update={"tile": 256})
    manifest = segment(source, output, model=untrained(raster.bands), options=asked)
    assert_same_grid(output, source)
    with rasterio.open(source) as file:
        missing_YX = raster.missing(file)
    labels_YX = labels_of(output)
    assert np.array_equal(labels_YX == NODATA, missing_YX)
    assert manifest["nodata_pixels"] == missing_YX.sum()
    assert sum(row["pixels"] for row in manifest["classes"]) == (~missing_YX).sum()
    assert set(np.unique(labels_YX)) <= {0, 1, 2, 3, NODATA}
    assert raster.note in "; ".join(manifest["notes"])
