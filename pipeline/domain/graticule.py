"""How large the pixels of a raster in degrees are: smaller towards the poles."""

from __future__ import annotations

import math
from dataclasses import dataclass

AXIS_M, SQUARED_ECCENTRICITY = 6378137.0, 0.00669437999014
"""Of WGS84: half the longer axis, in metres; other ellipsoids in use differ by parts of 10,000."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graticule:
    """Rows along parallels, columns along meridians."""

    first: float
    """Latitude where row 0 begins, in radians."""

    step: float
    """From one row to the next, in radians; negative southwards."""

    width: float
    """Of a pixel, in radians of longitude."""

    def pixel_m2(self, start: int, stop: int) -> float:
        """Area on the ellipsoid, the mean over the pixels of rows [start, stop)."""
        edges = (self.first + self.step * row for row in (start, stop))
        north, south = (_zone_m2(edge) for edge in edges)
        return abs(north - south) * self.width / (stop - start)


def _zone_m2(latitude: float) -> float:
    """From the equator to a parallel, for each radian of longitude."""
    e, sine = (
        math.sqrt(SQUARED_ECCENTRICITY),
        math.sin(min(max(latitude, -math.pi / 2), math.pi / 2)),
    )
    half = AXIS_M**2 * (1 - SQUARED_ECCENTRICITY) / 2
    return half * (sine / (1 - (e * sine) ** 2) + math.atanh(e * sine) / e)
