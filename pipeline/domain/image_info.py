"""What is known of an image before its pixels are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pipeline.domain.graticule import Graticule
from pipeline.domain.region import Shape
from pipeline.errors import SourceError


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """Shape, channels and geometry of a raster or volume, as an adapter reads them."""

    shape: Shape
    """Pixels per axis, in the order of ``axes``."""

    axes: tuple[str, ...]
    """``("y", "x")`` or ``("z", "y", "x")``."""

    channels: tuple[str, ...]
    """Channel names; the one-based number as text where the file names none."""

    dtype: str
    """Native numpy dtype of the values that ``Source.read`` returns, in native byte order."""

    nodata: tuple[float | None, ...]
    """Nodata value per channel; None where the file states none."""

    spacing: tuple[float, ...]
    """Distance between neighbouring pixel centres per axis, in ``unit``."""

    unit: Literal["m", "mm", "px"]
    """Unit of ``spacing``; ``px`` where the file gives no physical size."""

    fullness: float = 1.0
    """A pixel's size over that of a box with sides ``spacing``: below 1 where axes are oblique."""

    graticule: Graticule | None = None
    """Rasters in degrees: how large pixels are at each latitude; None where all are alike."""

    crs: str | None = None
    """Coordinate reference system as WKT2, for rasters that have one."""

    affine: tuple[float, ...] = ()
    """Rasters: a, b, c, d, e, f of ``x = a*col + b*row + c``. Volumes: 16 numbers, row-major."""

    modality: str | None = None
    """DICOM's code of the kind of scan, such as CT; None where the file does not say."""

    selection: str | None = None
    """The chosen time or volume of a 4-D file; None where there was nothing to choose."""

    notes: tuple[str, ...] = ()
    """Things a user should know: no CRS, rotated affine, sform and qform that differ."""

    def __post_init__(self) -> None:
        if not (len(self.shape) == len(self.axes) == len(self.spacing)) or min(self.shape) < 1:
            raise SourceError(
                f"shape {self.shape}, axes {self.axes}, spacing {self.spacing} differ"
            )
        if len(self.nodata) != len(self.channels) or not self.channels:
            raise SourceError(f"{len(self.channels)} channels but {len(self.nodata)} nodata values")
        if not all(math.isfinite(s) and s > 0 for s in self.spacing):
            raise SourceError(f"spacing must be positive and finite, got {self.spacing}")

    @property
    def ndim(self) -> int:
        """Number of spatial axes: 2 for a raster, 3 for a volume."""
        return len(self.shape)

    @property
    def voxel_size(self) -> float:
        """Area of a pixel in m2, or volume of a voxel in ml; 1.0 where the unit is pixels."""
        size = math.prod(self.spacing) * self.fullness
        return size / 1000.0 if self.unit == "mm" else size
