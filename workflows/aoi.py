"""``--aoi FILE``: the part of a scene or scan that gets labels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from adapters.uri import is_known, open_source
from pipeline.domain import Grid, ImageInfo
from pipeline.errors import SourceError
from pipeline.ports import Area


@dataclass(frozen=True, slots=True, kw_only=True)
class Aoi:
    """An area and where it was read."""

    path: Path
    area: Area
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """What plan.json and the manifest say of it."""
        return {"uri": str(self.path), "digest": self.area.digest}


def open_aoi(path: Path, image: ImageInfo, *, scratch: Path | None) -> Aoi:
    """The area that a file means on an image: polygons on a raster, a mask on a volume.

    Raises SourceError, where no pixel lies inside as well, and SourceReadError.
    """
    if image.ndim == 2:
        area, notes = _polygons(path, image)
    else:
        area, notes = _mask(path, image, scratch=scratch), ()
    if not area.touches(area.bounds):
        raise SourceError(f"--aoi {path}: no pixel's centre of this image lies inside")
    return Aoi(path=path.absolute(), area=area, notes=notes)


def aoi_digest(path: Path) -> str:
    """Identity of a file of polygons, which many scenes share. Raises SourceError."""
    if is_known(path.name):
        raise SourceError(f"--aoi {path}: many scans share no mask; give polygons, or segment one")
    from adapters.polygon_file import read_polygons

    return read_polygons(path).digest


def _polygons(path: Path, image: ImageInfo) -> tuple[Area, tuple[str, ...]]:
    if is_known(path.name):
        raise SourceError(f"--aoi {path}: a raster takes polygons; give a GeoJSON or GeoPackage")
    from adapters.polygon_file import read_polygons

    file = read_polygons(path)
    return file.on(image), file.notes


def _mask(path: Path, image: ImageInfo, *, scratch: Path | None) -> Area:
    if not is_known(path.name):
        raise SourceError(f"--aoi {path}: a volume takes a mask on its own grid, such as a NIfTI")
    from adapters.mask_area import MaskArea
    from workflows.same_grid import check_same_grid

    source = open_source(str(path), scratch=scratch)
    check_same_grid(image, source.info, names=f"the scan and --aoi {path}")
    return MaskArea(source, source.digest())


@lru_cache(maxsize=16)
def tiles_within(area: Area, grid: Grid) -> tuple[int, ...]:
    """Numbers of the tiles with a pixel inside, ascending. Raises SourceReadError."""
    near = sorted(grid.meeting(area.bounds))
    return tuple(number for number in near if area.touches(grid.core(number)))
