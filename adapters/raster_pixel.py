"""How large a pixel of a raster is, in metres."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, Literal

from rasterio.errors import CRSError

from pipeline.domain import Graticule
from pipeline.domain.graticule import AXIS_M, SQUARED_ECCENTRICITY
from pipeline.errors import SourceError

AREA_SPREAD = 0.01
"""Share by which areas of pixels of one scene may differ before it is said."""


def pixel_size(
    dataset: Any, *, path: Path
) -> tuple[tuple[float, float], Literal["m", "px"], float]:
    """Sides of a pixel, (y, x), in metres, or 1 px where there is no CRS.

    And its area over that of a rectangle with these sides.
    """
    if not dataset.crs:
        return (1.0, 1.0), "px", 1.0
    affine = dataset.transform
    try:
        if dataset.crs.is_geographic:
            per_x, per_y = _metres_per_unit(dataset, path=path)
        else:
            per_x = per_y = dataset.crs.units_factor[1]  # of a local system too
    except CRSError as error:
        raise SourceError(f"{path}: its CRS has no unit of length or angle: {error}") from error
    height = math.hypot(affine.b * per_x, affine.e * per_y)
    width = math.hypot(affine.a * per_x, affine.d * per_y)
    area = abs(affine.determinant) * per_x * per_y
    return (height, width), "m", area / (height * width)


def graticule(dataset: Any) -> Graticule | None:
    """How large the pixels of each row are; None but for rows along parallels, in degrees."""
    affine = dataset.transform
    if not dataset.crs or not dataset.crs.is_geographic or affine.b or affine.d:
        return None
    per = dataset.crs.units_factor[1]
    return Graticule(first=affine.f * per, step=affine.e * per, width=abs(affine.a) * per)


def area_notes(dataset: Any) -> tuple[str, ...]:
    """What to say of areas: in degrees, pixels of one scene differ, and rows of a turned one."""
    turned = dataset.transform.b or dataset.transform.d
    if not dataset.crs or not dataset.crs.is_geographic or not turned:
        return ()
    spread = _area_spread(dataset)
    if spread <= AREA_SPREAD:
        return ()
    text = f"a pixel at the middle, from which one at a corner differs by {spread:.1%}"
    return (f"in degrees: areas count with {text}",)


def _metres_per_unit(dataset: Any, *, path: Path) -> tuple[float, float]:
    """Metres per unit of longitude and of latitude at the middle of the scene."""
    latitude = _latitude(dataset, down=0.5, across=0.5)
    if not abs(latitude) < math.pi / 2:
        middle = latitude / dataset.crs.units_factor[1]
        raise SourceError(f"{path}: its middle lies at latitude {middle}; check CRS and axis order")
    east, north = _metres_per_radian(latitude)
    return east * dataset.crs.units_factor[1], north * dataset.crs.units_factor[1]


def _latitude(dataset: Any, *, down: float, across: float) -> float:
    """Of the place that many heights and widths of the scene from its corner, in radians."""
    affine = dataset.transform
    stated = affine.d * dataset.width * across + affine.e * dataset.height * down + affine.f
    return float(stated * dataset.crs.units_factor[1])


def _metres_per_radian(latitude: float) -> tuple[float, float]:
    """Of longitude and of latitude."""
    squash = 1.0 - SQUARED_ECCENTRICITY * math.sin(latitude) ** 2
    east = AXIS_M / math.sqrt(squash) * math.cos(latitude)
    return east, AXIS_M * (1.0 - SQUARED_ECCENTRICITY) / squash**1.5


def _area_spread(dataset: Any) -> float:
    """By which share a pixel's area at a corner differs from that at the middle, at most."""
    places = [(0.5, 0.5), *itertools.product((0.0, 1.0), repeat=2)]
    latitudes = [_latitude(dataset, down=down, across=across) for down, across in places]
    middle, *corners = (math.prod(_metres_per_radian(latitude)) for latitude in latitudes)
    return max(abs(corner / middle - 1) for corner in corners)
