"""From a path to the adapter that reads or writes it; imports that adapter only."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipeline.errors import SourceError
from pipeline.ports import Source

_RASTERS = (".tif", ".tiff", ".vrt")
_NIFTI = (".nii", ".nii.gz")
_ITK = (".nrrd", ".mha", ".mhd")
_KNOWN = _RASTERS + _NIFTI + _ITK


def is_known(name: str) -> bool:
    """Whether a file of this name is one that ``open_source`` reads; DICOM comes as a folder."""
    return name.lower().endswith(_KNOWN)


def local_path(uri: str) -> Path:
    """The path that it is. Raises SourceError for an address."""
    if "://" in uri:
        raise SourceError(f"{uri}: only local files are read; copy it to this machine")
    return Path(uri)


def open_source(
    uri: str,
    *,
    volume: int | None = None,
    series: str | None = None,
    scratch: Path | None = None,
) -> Source:
    """The source at a local path; nothing is read yet.

    Args:
        uri: A GeoTIFF, VRT, NIfTI, NRRD or MetaImage file, or a folder with a DICOM series.
        volume: Which volume of a 4-D NIfTI, from 0.
        series: SeriesInstanceUID, where the folder holds several series.
        scratch: Directory where a volume that is not random access may be unpacked.

    Raises:
        SourceError: no such file, an unknown suffix, or a choice that this kind does not have.
    """
    path, name = local_path(uri), uri.lower()
    if not path.exists():
        raise SourceError(f"{uri} does not exist")
    if volume is not None and not name.endswith(_NIFTI):
        raise SourceError(f"volume {volume} asked of {uri}, which is no NIfTI; leave it out")
    if series is not None and not path.is_dir():
        raise SourceError(f"series {series} asked of {uri}, which is no folder; leave it out")
    if path.is_dir():
        from adapters.dicom_series import DicomSeries

        return DicomSeries(path, series, scratch=scratch)
    if name.endswith(".dcm"):
        raise SourceError(f"{uri} is one slice of a DICOM series; give the folder it lies in")
    return _open_file(path, volume=volume, scratch=scratch)


def open_channels(
    uri: str,
    *,
    volume: int | None = None,
    series: str | None = None,
    scratch: Path | None = None,
) -> Source:
    """As ``open_source``, but a 4-D NIfTI of which no volume is chosen comes whole.

    Its volumes are then channels. Raises SourceError.
    """
    if volume is None and uri.lower().endswith(_NIFTI) and Path(uri).is_file():
        from adapters.nifti_volumes import NiftiVolumes

        return NiftiVolumes(Path(uri), scratch)
    return open_source(uri, volume=volume, series=series, scratch=scratch)


def _open_file(path: Path, *, volume: int | None, scratch: Path | None) -> Source:
    name = path.name.lower()
    if name.endswith(_RASTERS):
        from adapters.geotiff import GeoTiffSource

        return GeoTiffSource(path)
    if name.endswith(_NIFTI):
        from adapters.nifti import NiftiSource

        return NiftiSource(path, volume=volume, scratch=scratch)
    if name.endswith(_ITK):
        from adapters.itk_image import ItkImage

        return ItkImage(path, scratch=scratch)
    raise SourceError(
        f"{path}: unknown suffix; known are {', '.join(_KNOWN)}, and a folder of DICOM files"
    )


def output_kind(uri: str) -> Literal["cog", "nifti"]:
    """What to write at ``uri``, by its suffix. Raises SourceError."""
    name = uri.lower()
    if name.endswith((".tif", ".tiff")):
        return "cog"
    if name.endswith(_NIFTI):
        return "nifti"
    raise SourceError(f"output {uri}: unknown suffix; write .tif for rasters, .nii.gz for volumes")
