"""A finished label volume as NIfTI, on the source's own grid: geometry copied, then proved.

The file is little-endian; geometry fields hold the source's values bit for bit, whatever its byte
order. Nothing else of the source's header or extensions is carried: free text may name a patient.
Axes in array names: ijk is the file's order, i fastest.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Extension

from adapters.nifti_header import STREAM_ERRORS, VolumeGrid, is_gzip, read_header
from pipeline.domain import Region
from pipeline.errors import FinishError
from pipeline.ports import ArrayStore

GEOMETRY_FIELDS = (
    "sform_code",
    "qform_code",
    "srow_x",
    "srow_y",
    "srow_z",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "xyzt_units",
)
"""Copied whole; of ``pixdim`` the first four: the handedness and three voxel sizes."""

INTENT_LABEL = 1002
CARET_EXTENSION = 30
"""The extension code under which viewers look for a Caret label table."""


class Label(NamedTuple):
    """One value of the mask, as viewers show it."""

    value: int
    name: str
    color: str
    """``#rrggbb``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NiftiSpec:
    """What the mask says besides its voxels."""

    dtype: Literal["uint8", "uint16"]
    nodata: int
    """Value where nothing could be predicted; listed as a transparent label."""

    labels: tuple[Label, ...]

    intent_name: str
    """Cut to the format's 15 bytes."""

    description: str
    """Cut to the format's 79 bytes; no clock, no patient."""

    slab_voxels: int = 64
    """Thickness of what is held at once, along the slowest axis: about a chunk of the store."""


def write_nifti(target: Path, *, store: ArrayStore, grid: VolumeGrid, spec: NiftiSpec) -> None:
    """Stream the store into ``target`` (``.nii`` or ``.nii.gz``), check it, and give it its name.

    Args:
        target: the final path; it appears only when the file has passed ``verify_nifti``.
        store: labels in canonical (z, y, x) order, of the source's shape.
        grid: the source's 3-D grid and NIfTI version, which the mask takes over.
        spec: what the mask says besides its voxels.

    Raises:
        FinishError: the file could not be written, or does not say what the store says.
    """
    partial = target.with_name(f".partial-{target.name}")
    try:
        _write(partial, store=store, grid=grid, spec=spec)
        verify_nifti(partial, store=store, grid=grid, spec=spec)
        partial.replace(target)
    except OSError as error:
        raise FinishError(
            f"cannot write {target}: {error}; free the disk and run the same command again"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def verify_nifti(path: Path, *, store: ArrayStore, grid: VolumeGrid, spec: NiftiSpec) -> None:
    """Open ``path`` anew and compare it with the source's header and with every voxel stored.

    Raises:
        FinishError: names the first difference.
    """
    written = read_header(path)
    _verify_geometry(written, grid.header, path=path)
    try:
        image = nib.load(path, keep_file_open=True)
        found = (image.shape, image.get_data_dtype(), image.header.get_intent()[0])
        asked = (grid.shape_ijk, np.dtype(spec.dtype), "label")
        if found != asked:
            raise FinishError(f"{path} has shape, type, intent {found}, not {asked}")
        for slab, region in grid.slabs(spec.slab_voxels):
            index_ijk = slab.slices(within=Region.whole(grid.shape_ijk))
            found_ijk = np.asarray(image.dataobj[index_ijk])
            stored_ijk = grid.orientation.restore(store.read(region))
            if not np.array_equal(found_ijk, stored_ijk):
                at = tuple(int(n) for n in np.argwhere(found_ijk != stored_ijk)[0])
                voxel = tuple(a + b for a, b in zip(slab.start, at, strict=True))
                raise FinishError(
                    f"{path} holds {found_ijk[at]} at voxel (i, j, k) = {voxel},"
                    f" the store holds {stored_ijk[at]}"
                )
    except (*STREAM_ERRORS, ImageFileError) as error:
        raise FinishError(f"{path} cannot be read back: {error}") from error


def _verify_geometry(written: Any, source: Any, *, path: Path) -> None:
    for name in GEOMETRY_FIELDS:
        if _bits(written[name]) != _bits(source[name]):
            raise FinishError(f"{path} has {name} {written[name]}, the source {source[name]}")
    if _bits(written["pixdim"][:4]) != _bits(source["pixdim"][:4]):
        raise FinishError(
            f"{path} has pixdim {written['pixdim'][:4]}, the source {source['pixdim'][:4]}"
        )


def _bits(values: Any) -> bytes:
    array = np.asarray(values)
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def _write(path: Path, *, store: ArrayStore, grid: VolumeGrid, spec: NiftiSpec) -> None:
    header = _mask_header(grid, spec)
    with path.open("wb") as file:
        with _compressed(file) if is_gzip(path) else nullcontext(file) as stream:
            header.write_to(stream)
            for _, region in grid.slabs(spec.slab_voxels):
                labels_ijk = grid.orientation.restore(store.read(region))
                if labels_ijk.dtype != np.dtype(spec.dtype):
                    raise FinishError(f"store holds {labels_ijk.dtype}, asked for {spec.dtype}")
                stream.write(labels_ijk.astype(labels_ijk.dtype.newbyteorder("<")).tobytes("F"))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _compressed(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """A gzip member without name and clock, so that equal masks are equal files."""
    with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0) as stream:
        yield cast("IO[bytes]", stream)


def _mask_header(grid: VolumeGrid, spec: NiftiSpec) -> Any:
    kind = nib.Nifti2Header if isinstance(grid.header, nib.Nifti2Header) else nib.Nifti1Header
    header = kind(endianness="<")
    header.set_data_shape(grid.shape_ijk)
    header.set_data_dtype(np.dtype(spec.dtype))
    for name in GEOMETRY_FIELDS:
        header[name] = grid.header[name]
    header["pixdim"][:4] = grid.header["pixdim"][:4]
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["intent_code"] = INTENT_LABEL
    header["intent_name"] = _cut(spec.intent_name, 15)
    header["descrip"] = _cut(spec.description, 79)
    header.extensions.append(Nifti1Extension(CARET_EXTENSION, _label_table(spec)))
    return header


def _cut(text: str, size: int) -> bytes:
    return text.encode("ascii", "replace")[:size]


def _label_table(spec: NiftiSpec) -> bytes:
    """The Caret label table, as viewers read it; the nodata value is transparent."""
    root = ElementTree.Element("CaretExtension")
    volume = ElementTree.SubElement(root, "VolumeInformation", Index="0")
    table = ElementTree.SubElement(volume, "LabelTable")
    for value, name, color in (*spec.labels, Label(spec.nodata, "nodata", "#000000")):
        red, green, blue = (f"{byte / 255:.6f}" for byte in bytes.fromhex(color.removeprefix("#")))
        alpha = "0" if value == spec.nodata else "1"
        key = {"Key": str(value), "Red": red, "Green": green, "Blue": blue, "Alpha": alpha}
        ElementTree.SubElement(table, "Label", key).text = name
    ElementTree.SubElement(volume, "VolumeType").text = "Label"
    return cast("bytes", ElementTree.tostring(root, encoding="UTF-8", xml_declaration=True))
