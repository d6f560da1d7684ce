"""Polygons from a vector file: GeoJSON, GeoPackage, Shapefile, FlatGeobuf, KML, GML, as GDAL reads.

They are brought to a raster's own pixels corner by corner: edges stay straight there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import shapely
from numpy.typing import NDArray
from pyogrio.errors import DataLayerError, DataSourceError, FieldError, GeometryError
from rasterio import warp
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError

from adapters.polygon_area import PolygonArea
from pipeline.domain import ImageInfo
from pipeline.errors import SourceError

_READ_ERRORS = (DataSourceError, DataLayerError, FieldError, GeometryError, shapely.GEOSException)
_POLYGON = 3
_EDGE_POINTS = 21
"""Points along each side of a scene by which its extent is known in another CRS."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolygonFile:
    """What a file holds: polygons in the file's own CRS."""

    path: Path

    polygons: NDArray[Any]
    """(n,) polygons, none of them empty, multipolygons taken apart; n is at least 1."""

    crs: str | None
    """As the file says it; None where it says none."""

    digest: str
    """SHA-256 of polygons and CRS."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Things a user should know: outlines that cross themselves."""
        crossing = int((~shapely.is_valid(self.polygons)).sum())
        if not crossing:
            return ()
        count = f"{crossing} of {len(self.polygons)} polygons of {self.path.name}"
        return (f"{count} cross themselves: taken for the loops that their outlines make",)

    def on(self, image: ImageInfo) -> PolygonArea:
        """Those that may meet a raster, in its pixels. Raises SourceError."""
        try:
            polygons = self._in_crs_of(image)
        except (RasterioError, CRSError) as error:
            raise SourceError(
                f"{self.path} could not be brought into the scene's CRS: {_line(error)}"
            ) from error
        if not np.isfinite(shapely.get_coordinates(polygons)).all():
            raise SourceError(
                f"{self.path} has corners that the scene's CRS has no place for: clip the polygons"
            )
        matrix_22, origin_2 = _affine(image)
        moved = shapely.transform(
            polygons, lambda places_N2: np.linalg.solve(matrix_22, (places_N2 - origin_2).T).T
        )
        loops = shapely.get_parts(shapely.get_parts(shapely.make_valid(moved)))
        return PolygonArea(
            polygons=tuple(shapely.to_wkb(loops[_polygonal(loops)]).tolist()),
            shape=image.shape,
            digest=self.digest,
        )

    def _in_crs_of(self, image: ImageInfo) -> NDArray[Any]:
        """Polygons whose extent meets that of the image, in its CRS. Raises SourceError."""
        if (self.crs is None) != (image.crs is None):
            here, there = ("has no CRS", "has one") if image.crs else ("has a CRS", "has none")
            raise SourceError(
                f"{self.path} {here}, the scene {there}: give polygons in the scene's CRS, or, for"
                " a scene without, in a file without"
            )
        extent = _extent(image)
        if self.crs is None or CRS.from_user_input(self.crs) == CRS.from_user_input(image.crs):
            return self._meeting(*extent)
        there = warp.transform_bounds(image.crs, self.crs, *extent, densify_pts=_EDGE_POINTS)
        moved: NDArray[Any] = shapely.transform(
            self._meeting(*there),
            lambda places_N2: np.stack(warp.transform(self.crs, image.crs, *places_N2.T), axis=-1),
        )
        return moved

    def _meeting(self, left: float, bottom: float, right: float, top: float) -> NDArray[Any]:
        """Polygons whose extent meets this one, in the file's CRS.

        Left is more than right where it lies astride the meridian of 180 degrees.
        """
        x0_N, y0_N, x1_N, y1_N = shapely.bounds(self.polygons).T
        begins_N, ends_N = x0_N <= right, left <= x1_N
        meets_N = begins_N | ends_N if left > right else begins_N & ends_N
        return np.asarray(self.polygons[meets_N & (y0_N <= top) & (bottom <= y1_N)])


def read_polygons(path: Path) -> PolygonFile:
    """Read all polygons of a file. Raises SourceError where there are none, or other things."""
    if not path.is_file():
        raise SourceError(f"{path} is not a file; give a GeoJSON, GeoPackage or Shapefile")
    with path.open("rb") as file:
        if b"<OGR" in file.read(1024):  # descriptions of other sources, on the network as well
            raise SourceError(f"{path} holds no polygons, but says where they are; give that file")
    try:
        layers = [str(name) for name, _ in pyogrio.list_layers(path)]
        if len(layers) != 1:
            raise SourceError(f"{path} holds layers {', '.join(layers)}: give a file with one")
        meta, _, wkb, _ = pyogrio.raw.read(path, columns=[], force_2d=True)
        found = shapely.from_wkb(wkb)
    except _READ_ERRORS as error:
        raise SourceError(f"{path} could not be read as a vector file: {_line(error)}") from error
    # Part by part, so that where parts overlap it is inside.
    polygons = shapely.get_parts(found[~(shapely.is_missing(found) | shapely.is_empty(found))])
    others = polygons[~_polygonal(polygons)]
    if others.size or not polygons.size:
        kinds = ", ".join(sorted({part.geom_type for part in others})) or "nothing"
        raise SourceError(f"{path} holds {kinds}: only polygons have an inside; give those alone")
    crs, digest = meta["crs"], hashlib.sha256()
    for part in (str(crs).encode(), *shapely.to_wkb(polygons)):
        digest.update(hashlib.sha256(part).digest())
    return PolygonFile(path=path, polygons=polygons, crs=crs, digest=digest.hexdigest())


def _polygonal(parts: NDArray[Any]) -> NDArray[np.bool_]:
    """(n,) bool: which are polygons that are not empty."""
    return np.asarray((shapely.get_type_id(parts) == _POLYGON) & ~shapely.is_empty(parts))


def _extent(image: ImageInfo) -> tuple[float, float, float, float]:
    """Left, bottom, right and top of an image, in its CRS."""
    matrix_22, origin_2 = _affine(image)
    rows, columns = image.shape
    corners_42 = np.array([(0, 0), (columns, 0), (0, rows), (columns, rows)]) @ matrix_22.T
    left, bottom = (corners_42 + origin_2).min(axis=0)
    right, top = (corners_42 + origin_2).max(axis=0)
    return left, bottom, right, top


def _affine(image: ImageInfo) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(2, 2) and (2,): x and y of a place are the first times (column, row), plus the second."""
    matrix_23 = np.array(image.affine).reshape(2, 3)
    return matrix_23[:, :2], matrix_23[:, 2]


def _line(error: BaseException) -> str:
    """The cause in one line; GDAL's own words hang on the binding's exception."""
    return " ".join(str(error.__cause__ or error).split())
