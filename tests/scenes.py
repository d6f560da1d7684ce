"""Images and bundles that tests and benchmarks make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin
from scipy.ndimage import gaussian_filter

from pipeline.models.bundle import Bundle


def write_raster(path: Path, image_CYX: np.ndarray, **profile: object) -> Path:
    """A tiled GeoTIFF at 10 m in UTM 33N, nodata 0, unless ``profile`` says otherwise."""
    count, height, width = image_CYX.shape
    defaults: dict[str, object] = {
        "crs": "EPSG:32633",
        "transform": from_origin(500000, 5000000, 10, 10),
        "nodata": 0,
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
    }
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=width,
        height=height,
        count=count,
        dtype=image_CYX.dtype,
        **(defaults | profile),
    ) as file:
        file.write(image_CYX)
    return path


def texture(shape: tuple[int, ...], *, seed: int) -> np.ndarray:
    """Smooth noise around 1000, uint16: several wavelengths, so that all classes appear."""
    rng = np.random.default_rng(seed)
    waves = sum(gaussian_filter(rng.normal(size=shape), s) * s * 150 for s in (1, 2, 4))
    return np.clip(1000 + waves, 1, 65535).astype(np.uint16)


def fresh(path: Path, **changes: object) -> Bundle:
    """An untrained bundle: slim, three bands, four classes unless changed."""
    from workflows.model import create

    asked: dict[str, object] = {
        "family": "v3",
        "backbone": "slim",
        "dims": 2,
        "bands": 3,
        "classes": 4,
        "output_stride": None,
        "seed": 7,
    }
    return create(output=path, **(asked | changes))  # type: ignore[arg-type]


def noisy(image_S: np.ndarray) -> np.ndarray:
    """(3, *S) float32 probabilities by brightness, wrong in a third of the pixels."""
    truth_S = np.digitize(image_S, np.quantile(image_S, [0.33, 0.67]))
    noise_KS = np.random.default_rng(3).normal(0, 1.5, (3, *image_S.shape))
    odds_KS = np.exp(noise_KS + 1.5 * (truth_S == np.arange(3).reshape(3, *(1,) * truth_S.ndim)))
    return (odds_KS / odds_KS.sum(0)).astype(np.float32)
