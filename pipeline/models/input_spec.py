"""What goes into a network and what comes out by name: parts of a bundle."""

from __future__ import annotations

import colorsys
import math
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from pipeline.errors import BundleError

SCALING_KEYS = MappingProxyType(
    {
        "z-score": ("mean", "std"),
        "min-max": ("minimum", "maximum"),
        "offset-scale": ("offset", "scale"),
        "clip": ("minimum", "maximum"),
    }
)
"""The two parameters of each type of scaling."""

_ALL_KEYS = tuple(dict.fromkeys(key for pair in SCALING_KEYS.values() for key in pair))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """How pixel values become network input; each parameter one number, or one per band.

    z-score ``(x - mean) / std``; min-max ``(x - minimum) / (maximum - minimum)``; offset-scale
    ``x * scale + offset``; clip ``min(max(x, minimum), maximum)``.

    >>> Scaling(type="z-score", mean=(10.0,), std=(2.0, 4.0)).pairs(2)
    ((10.0, 2.0), (10.0, 4.0))
    """

    type: Literal["z-score", "min-max", "offset-scale", "clip"]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    minimum: tuple[float, ...] = ()
    maximum: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.type not in SCALING_KEYS:
            raise BundleError(f"scaling {self.type!r} asked; there are: {', '.join(SCALING_KEYS)}")
        keys = SCALING_KEYS[self.type]
        given = tuple(key for key in _ALL_KEYS if getattr(self, key))
        if set(given) != set(keys):
            found = " and ".join(given) or "nothing"
            raise BundleError(f"scaling {self.type} takes {' and '.join(keys)}, got {found}")
        for low, high in self.pairs(max(len(getattr(self, key)) for key in keys)):
            if not (math.isfinite(low) and math.isfinite(high)):
                raise BundleError(f"scaling {self.type} needs finite numbers, got {low}, {high}")
            if self.type == "z-score" and high <= 0:
                raise BundleError(f"std must be above 0, got {high}")
            if "maximum" in keys and low >= high:
                raise BundleError(f"minimum {low} must be below maximum {high}")

    def pairs(self, bands: int) -> tuple[tuple[float, float], ...]:
        """The two parameters per band. Raises BundleError for another number of bands."""
        columns = []
        for key in SCALING_KEYS[self.type]:
            values: tuple[float, ...] = getattr(self, key)
            if len(values) not in (1, bands):
                raise BundleError(f"{key} of scaling has {len(values)} numbers for {bands} bands")
            columns.append(values if len(values) == bands else values * bands)
        return tuple(zip(*columns, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """The images that a network was trained on."""

    bands: tuple[str, ...] | int
    """Names in order; the number of bands where they have no names."""

    dtype: str
    """numpy dtype of the pixel values."""

    scaling: Scaling

    pixel_size_m: float | None = None
    """Ground distance between pixel centres, in metres; rasters."""

    spacing_mm: tuple[float, ...] | None = None
    """Distance between voxel centres, in millimetres, axes (z, y, x); volumes."""

    modality: str | None = None
    """DICOM's code of the kind of scan, such as CT or MR (PS3.3 C.7.3.1.1.1)."""

    def __post_init__(self) -> None:
        if self.band_count < 1:
            raise BundleError(f"a network needs at least one band, got {self.bands!r}")
        if not isinstance(self.bands, int) and len(set(self.bands)) != len(self.bands):
            raise BundleError(f"band names must differ, got {list(self.bands)}")
        self.scaling.pairs(self.band_count)
        if self.pixel_size_m is not None and self.spacing_mm is not None:
            raise BundleError("pixel_size_m is for rasters, spacing_mm for volumes: give one")
        sizes = (self.pixel_size_m or 1.0, *(self.spacing_mm or ()))
        if not all(math.isfinite(size) and size > 0 for size in sizes):
            raise BundleError(f"pixel size and spacing must be positive, got {sizes}")

    @property
    def band_count(self) -> int:
        """How many bands the network takes."""
        return self.bands if isinstance(self.bands, int) else len(self.bands)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassInfo:
    """One class of the mask."""

    id: int
    """Value written to the mask, 0 to 65534."""

    name: str

    color: str
    """``#rrggbb``."""

    def __post_init__(self) -> None:
        if not 0 <= self.id <= 65534:
            raise BundleError(f"class id {self.id} of {self.name!r} is not within 0 to 65534")
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", self.color):
            raise BundleError(f"color of class {self.name!r} must be '#rrggbb', got {self.color!r}")

    @classmethod
    def numbered(cls, number: int, *, of: int, name: str) -> ClassInfo:
        """Class ``number`` of so many that nobody gave a colour: hues around the circle."""
        red, green, blue = colorsys.hsv_to_rgb(number / of, 0.65, 0.85)
        color = f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
        return cls(id=number, name=name, color=color)

    @property
    def rgb(self) -> tuple[int, int, int]:
        """The colour as red, green, blue, 0 to 255."""
        red, green, blue = bytes.fromhex(self.color[1:])
        return red, green, blue


@dataclass(frozen=True, slots=True)
class Legend:
    """The classes of a mask, in the order of the scores' channels."""

    classes: tuple[ClassInfo, ...]

    def __post_init__(self) -> None:
        ids = list(self.values)
        if len(ids) < 2 or len(set(ids)) != len(ids):
            raise BundleError(f"classes need at least two different ids, got {ids}")

    @property
    def values(self) -> tuple[int, ...]:
        """Class id of each channel."""
        return tuple(info.id for info in self.classes)

    @property
    def dtype(self) -> Literal["uint8", "uint16"]:
        """The smallest type that holds the class ids and nodata."""
        return "uint8" if max(self.values) <= 254 else "uint16"

    @property
    def nodata(self) -> int:
        """Mask value where no pixel was valid: the greatest of the type."""
        return 255 if self.dtype == "uint8" else 65535
