"""Vector files that tests make, and where they lie on a raster of ``scenes``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import shapely
from pyogrio.raw import write
from rasterio.features import rasterize
from rasterio.warp import transform

SCENE_CRS = "EPSG:32633"


def placed(polygon: Any, *, crs: str = SCENE_CRS) -> Any:
    """Of pixels (column, row) of a raster as ``write_raster`` makes it, the place on the ground."""

    def to_ground(places_N2: np.ndarray) -> np.ndarray:
        x_N, y_N = 500000 + 10 * places_N2[:, 0], 5000000 - 10 * places_N2[:, 1]
        return np.stack(transform(SCENE_CRS, crs, x_N, y_N), axis=-1)

    return shapely.transform(polygon, to_ground)


def write_vector(path: Path, *geometries: Any, crs: str | None = SCENE_CRS, **more: Any) -> Path:
    """A vector file of these geometries, in the format that its suffix says."""
    wkb = np.array([shapely.to_wkb(one) for one in geometries], dtype=object)
    kinds = {one.geom_type for one in geometries if one is not None}
    kind = kinds.pop() if len(kinds) == 1 else "Unknown"
    numbers = np.arange(len(wkb))
    write(path, wkb, [numbers], ["number"], geometry_type=kind, crs=crs, **more)
    return path


def inside(shape: tuple[int, ...], *polygons: Any) -> np.ndarray:
    """(*S) bool: what rasterio burns of polygons in pixels, over the whole scene at once."""
    return rasterize(polygons, out_shape=shape).astype(bool)
