"""From a path's suffix to the adapter that reads or writes it; imports that adapter only."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipeline.errors import SourceError
from pipeline.ports import Source

_RASTERS = (".tif", ".tiff", ".vrt")
_VOLUMES = (".nii", ".nii.gz")


def open_source(uri: str, *, volume: int | None = None, scratch: Path | None = None) -> Source:
    """The source at a local path; nothing is read yet.

    Args:
        uri: A GeoTIFF, VRT or NIfTI file.
        volume: Which volume of a 4-D NIfTI, from 0.
        scratch: Directory where a compressed volume may be unpacked.

    Raises:
        SourceError: no such file, a directory, an unknown suffix, or a volume of a raster.
    """
    if "://" in uri:
        raise SourceError(f"{uri}: only local files are read; copy it to this machine")
    path, name = Path(uri), uri.lower()
    if path.is_dir():
        raise SourceError(f"{uri} is a directory; give one file")
    if not path.exists():
        raise SourceError(f"{uri} does not exist")
    if name.endswith(_RASTERS):
        if volume is not None:
            raise SourceError(f"volume {volume} asked of {uri}, which is a raster; leave it out")
        from adapters.geotiff import GeoTiffSource

        return GeoTiffSource(path)
    if name.endswith(_VOLUMES):
        from adapters.nifti import NiftiSource

        return NiftiSource(path, volume=volume, scratch=scratch)
    raise SourceError(f"{uri}: unknown suffix; known are {', '.join(_RASTERS + _VOLUMES)}")


def output_kind(uri: str) -> Literal["cog", "nifti"]:
    """What to write at ``uri``, by its suffix. Raises SourceError."""
    name = uri.lower()
    if name.endswith((".tif", ".tiff")):
        return "cog"
    if name.endswith(_VOLUMES):
        return "nifti"
    raise SourceError(f"output {uri}: unknown suffix; write .tif for rasters, .nii.gz for volumes")
