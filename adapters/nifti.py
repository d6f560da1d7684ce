"""NIfTI volumes as a Source: closest-canonical (z, y, x) order, native values, lazily opened.

Axes in array names: C channel (always one), Z Y X space; ijk is the file's own order.
"""

from __future__ import annotations

import hashlib
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.fileslice import fileslice
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from adapters.nifti_header import (
    STREAM_ERRORS,
    Orientation,
    VolumeGrid,
    best_affine,
    copy_stream,
    grid_shape,
    is_gzip,
    open_stream,
    read_header,
)
from adapters.scratch_file import content_name, damage, make_once
from pipeline.domain import ImageInfo, Region, Shape
from pipeline.errors import SourceError, SourceReadError
from pipeline.ports import Block

MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""Millimetres per unit of length, by the low three bits of ``xyzt_units``; 0 is unknown."""

UPRIGHT = 0.999
"""Fullness of voxels whose edges are not at right angles: nearly 3 degrees off."""

TRAILING_BYTES = 1 << 20
"""What a stream may hold past its voxels before it is taken for a decompression bomb."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where the chosen volume's voxels lie in the uncompressed file, and what they mean."""

    shape_ijk: tuple[int, int, int]
    dtype: np.dtype[Any]
    """As stored, byte order included."""

    offset: int
    """Byte of the chosen volume's first voxel."""

    end: int
    """Byte after the last voxel of the last volume."""

    slope: float
    inter: float
    """A value is ``slope * stored + inter``; 1 and 0 where the file states no scaling."""

    orientation: Orientation

    @property
    def shape_zyx(self) -> Shape:
        return self.orientation.canonical(self.shape_ijk)

    @property
    def scaled(self) -> bool:
        return (self.slope, self.inter) != (1.0, 0.0)


@dataclass(frozen=True)
class NiftiSource:
    """One 3-D volume of a ``.nii`` or ``.nii.gz`` file.

    A compressed file is not random access: with a scratch folder it is decompressed there once,
    by whoever first reads, and mapped by every process; without one each read starts over.
    """

    path: Path

    _: KW_ONLY

    volume: int | None = None
    """Zero-based volume of a 4-D file; None where there is nothing to choose."""

    scratch: Path | None = None
    """Folder shared by all readers of this run, for the decompressed file."""

    @cached_property
    def info(self) -> ImageInfo:
        """Shape, spacing in mm and affine. Raises SourceError."""
        layout, header = self._layout, self._header
        affine = best_affine(header, path=self.path)
        to_mm = MM_PER_UNIT[_length_unit(header)]
        spacing_ijk = tuple(float(s) for s in voxel_sizes(affine) * to_mm)
        return ImageInfo(
            shape=layout.shape_zyx,
            axes=("z", "y", "x"),
            channels=("1",),
            dtype="float32" if layout.scaled else layout.dtype.newbyteorder("=").name,
            nodata=(None,),
            spacing=layout.orientation.canonical(spacing_ijk),
            unit="mm",
            fullness=_fullness(affine),
            affine=tuple(float(a) for a in affine.ravel()),
            selection=self._selection,
            notes=_notes(header, affine=affine),
        )

    def unpack(self) -> None:
        """Unpack a compressed file into scratch. Raises SourceError or SourceReadError."""
        if not is_gzip(self.path):
            return
        try:
            self._decompressed()
        except STREAM_ERRORS as error:
            raise damage(error, of=self.path) from error

    def read(self, region: Region) -> Block:
        """``region`` in canonical order: (1, Z, Y, X) native dtype, float32 where scaled; new.

        Raises:
            SourceReadError: the file is truncated, overlong or corrupt.
        """
        layout = self._layout
        box = layout.orientation.to_storage(region, shape_zyx=layout.shape_zyx)
        index_ijk = box.slices(within=Region.whole(layout.shape_ijk))
        try:
            stored_ZYX = layout.orientation.arrange(self._stored(index_ijk))
        except (*STREAM_ERRORS, ValueError) as error:
            raise SourceReadError(f"cannot read {region} of {self.path}: {error}") from error
        if layout.scaled:
            image_ZYX = (stored_ZYX * np.float64(layout.slope) + layout.inter).astype(np.float32)
        else:
            image_ZYX = stored_ZYX.astype(layout.dtype.newbyteorder("="), order="C")
        return Block(image_ZYX[np.newaxis], np.isfinite(image_ZYX))

    def digest(self) -> str:
        """SHA-256 of the file's bytes. Raises SourceReadError."""
        try:
            with self.path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise SourceReadError(f"cannot read {self.path}: {error}") from error

    @property
    def grid(self) -> VolumeGrid:
        """What a mask of this volume copies: the file's own header. Raises SourceError."""
        return VolumeGrid.from_header(self._header, path=self.path)

    @cached_property
    def _header(self) -> Any:
        return read_header(self.path)

    @cached_property
    def _layout(self) -> _Layout:
        header, path = self._header, self.path
        shape, dtype = grid_shape(header, path=path), _dtype(header, path=path)
        offset, voxels = float(header["vox_offset"]), shape[0] * shape[1] * shape[2]
        if not header.single_vox_offset <= offset < np.inf:
            raise SourceError(f"{path} puts its voxels at byte {offset}, not behind its header")
        count = self._volumes
        if not 0 <= (self.volume or 0) < count:
            raise SourceError(f"--volume {self.volume} asked of {path}, which has {count} volumes")
        end = int(offset) + count * voxels * dtype.itemsize
        if not is_gzip(path) and path.stat().st_size < end:
            raise SourceError(
                f"{path} is cut short: {path.stat().st_size} bytes of {end}; fetch it again"
            )
        slope, inter = _scaling(header, path=path)
        return _Layout(
            shape_ijk=shape,
            dtype=dtype,
            offset=int(offset) + (self.volume or 0) * voxels * dtype.itemsize,
            end=end,
            slope=slope,
            inter=inter,
            orientation=Orientation.from_affine(best_affine(header, path=path)),
        )

    @property
    def _volumes(self) -> int:
        shape = self._header.get_data_shape()
        if any(n != 1 for n in shape[4:]):
            raise SourceError(f"{self.path} has shape {shape}; at most four axes can be read")
        count = int(shape[3]) if len(shape) > 3 else 1
        if count > 1 and self.volume is None:
            raise SourceError(
                f"{self.path} is 4-D with {count} volumes; choose one with --volume N,"
                f" N from 0 to {count - 1}"
            )
        return count

    @property
    def _selection(self) -> str | None:
        if len(self._header.get_data_shape()) < 4:
            return None
        return f"volume {self.volume or 0} of {self._volumes}"

    def _stored(self, index_ijk: tuple[slice, ...]) -> NDArray[Any]:
        """Stored values in (i, j, k) order; may alias the mapped file."""
        layout = self._layout
        plain = self._decompressed() if is_gzip(self.path) else self.path
        if plain is None:
            with open_stream(self.path) as stream:
                array: NDArray[Any] = fileslice(
                    stream, index_ijk, layout.shape_ijk, layout.dtype, layout.offset, order="F"
                )
            return array
        # Mapped anew for each read: pages that stay mapped would count as this process's memory.
        mapped = np.memmap(
            plain, layout.dtype, mode="r", offset=layout.offset, shape=layout.shape_ijk, order="F"
        )
        return mapped[index_ijk]

    def _decompressed(self) -> Path | None:
        """The plain file in scratch, made on first use; None without scratch."""
        if self.scratch is None:
            return None
        name = content_name([self.path], suffix=".nii")
        return make_once(self.scratch / name, write=self._decompress)

    def _decompress(self, sink: IO[bytes]) -> None:
        expected = self._layout.end
        with open_stream(self.path) as source:
            copy_stream(source, sink, expected_bytes=expected, limit=expected + TRAILING_BYTES)


def _length_unit(header: Any) -> int:
    return int(header["xyzt_units"]) & 7


def _dtype(header: Any, *, path: Path) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = header.get_data_dtype()
    except HeaderDataError as error:
        raise SourceError(f"{path} has an unknown data type: {error}") from error
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise SourceError(f"{path} holds {dtype} values; whole numbers or floats can be read")
    return dtype


def _scaling(header: Any, *, path: Path) -> tuple[float, float]:
    try:
        slope, inter = header.get_slope_inter()
    except HeaderDataError as error:
        raise SourceError(f"{path} has a scaling that cannot be used: {error}") from error
    return (1.0, 0.0) if slope is None else (slope, inter)


def _notes(header: Any, *, affine: NDArray[np.float64]) -> tuple[str, ...]:
    notes = []
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if not sform and not qform:
        notes.append("no sform and no qform: right and left are assumed, not known")
    if sform and qform:
        try:
            if not _same_place(header.get_qform(), affine, header=header):
                notes.append("sform and qform differ: the sform is used, the mask keeps both")
        except (HeaderDataError, ValueError) as error:
            notes.append(f"the qform is damaged ({error}): the sform is used, the mask keeps both")
    if _fullness(affine) < UPRIGHT:
        notes.append("axes are not at right angles, as of a tilted gantry")
    if _length_unit(header) == 0:
        notes.append("no unit of length: mm is assumed")
    if len(header.get_data_shape()) == 4 and header.get_data_shape()[3] == 1:
        notes.append("4-D with a single volume, which is taken")
    return tuple(notes)


def _fullness(affine: NDArray[np.float64]) -> float:
    """A voxel's volume over that of a box with its edges; 1 where they are at right angles."""
    edges = affine[:3, :3] / voxel_sizes(affine)
    return abs(float(np.linalg.det(edges)))


def _same_place(first: NDArray[np.float64], second: NDArray[np.float64], *, header: Any) -> bool:
    """Whether no corner of the volume lies more than a hundredth of a voxel elsewhere."""
    far = np.array([*header.get_data_shape()[:3], 1.0])
    smallest = float(np.min(header["pixdim"][1:4]))
    return bool((np.abs(first - second) @ far).max() <= 0.01 * smallest)
