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
from affine import Affine
from numpy.typing import NDArray
from pyogrio.errors import DataLayerError, DataSourceError, FieldError, GeometryError
from rasterio import warp
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError

from adapters.polygon_area import PolygonArea
from pipeline.domain import ImageInfo
from pipeline.errors import SourceError

_READ_ERRORS = (DataSourceError, DataLayerError, FieldError, GeometryError, shapely.GEOSException)
_POLYGONAL = (3, 6)
_EDGE_POINTS = 21
"""Points along each side of a scene by which its extent is known in another CRS."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolygonFile:
    """What a file holds: polygons in the file's own CRS."""

    path: Path

    polygons: NDArray[Any]
    """(n,) polygons and multipolygons, none of them empty; n is at least 1."""

    crs: str | None
    """As the file says it; None where it says none."""

    digest: str
    """SHA-256 of polygons and CRS."""

    def on(self, image: ImageInfo) -> PolygonArea:
        """Those that may meet a raster, in its pixels. Raises SourceError."""
        affine = Affine(*image.affine)
        polygons, from_crs, to_crs = self._near(image, affine), self.crs, image.crs

        def to_pixels(places_N2: NDArray[np.float64]) -> NDArray[np.float64]:
            """(N, 2) columns and rows of places (N, 2) x and y in the file's CRS."""
            x_N, y_N = places_N2.T
            if to_crs is not None:
                x_N, y_N = map(np.asarray, warp.transform(from_crs, to_crs, x_N, y_N))
            return np.stack(~affine * (x_N, y_N), axis=-1)

        try:
            moved = shapely.transform(polygons, to_pixels)
        except (RasterioError, CRSError) as error:
            raise SourceError(f"{self._to_crs_failed}: {_line(error)}") from error
        if not np.isfinite(shapely.get_coordinates(moved)).all():
            raise SourceError(f"{self._to_crs_failed}: corners lie beyond it; clip the polygons")
        # Where an outline crosses itself, what it winds around an odd number of times is inside.
        return PolygonArea(
            polygons=tuple(shapely.to_wkb(shapely.make_valid(moved)).tolist()),
            shape=image.shape,
            digest=self.digest,
        )

    def _near(self, image: ImageInfo, affine: Affine) -> NDArray[Any]:
        """Polygons whose extent meets that of the image. Raises SourceError."""
        if (self.crs is None) != (image.crs is None):
            here, there = ("has no CRS", "has one") if image.crs else ("has a CRS", "has none")
            raise SourceError(
                f"{self.path} {here}, the scene {there}: give polygons in the scene's CRS, or, for"
                " a scene without, in a file without"
            )
        rows, columns = image.shape
        corners = [affine * place for place in ((0, 0), (columns, 0), (0, rows), (columns, rows))]
        (left, right), (bottom, top) = (
            (min(ends), max(ends)) for ends in zip(*corners, strict=True)
        )
        if image.crs is not None:
            try:
                left, bottom, right, top = warp.transform_bounds(
                    image.crs, CRS.from_user_input(self.crs), left, bottom, right, top, _EDGE_POINTS
                )
            except (RasterioError, CRSError) as error:
                raise SourceError(f"{self._to_crs_failed}: {_line(error)}") from error
        x0_N, y0_N, x1_N, y1_N = shapely.bounds(self.polygons).T
        meets_N = (x0_N <= right) & (left <= x1_N) & (y0_N <= top) & (bottom <= y1_N)
        return np.asarray(self.polygons[meets_N])

    @property
    def _to_crs_failed(self) -> str:
        return f"{self.path} could not be brought into the scene's CRS"


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
    polygons = found[~(shapely.is_missing(found) | shapely.is_empty(found))]
    others = polygons[~np.isin(shapely.get_type_id(polygons), _POLYGONAL)]
    if others.size or not polygons.size:
        kinds = ", ".join(sorted({polygon.geom_type for polygon in others})) or "nothing"
        raise SourceError(f"{path} holds {kinds}: only polygons have an inside; give those alone")
    crs, digest = meta["crs"], hashlib.sha256()
    for part in (str(crs).encode(), *shapely.to_wkb(polygons)):
        digest.update(hashlib.sha256(part).digest())
    return PolygonFile(path=path, polygons=polygons, crs=crs, digest=digest.hexdigest())


def _line(error: BaseException) -> str:
    """The cause in one line; GDAL's own words hang on the binding's exception."""
    return " ".join(str(error.__cause__ or error).split())
