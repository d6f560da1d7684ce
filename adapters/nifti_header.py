"""The header of a NIfTI file, unrepaired, and how its storage order lies in the patient.

Axes: ijk is the file's order, i fastest; zyx is closest canonical: x to the right, y to the front
(anterior), z up (superior), each rising with its index.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from pipeline.domain import Region, Shape
from pipeline.errors import SourceError, SourceReadError
from pipeline.ports import Source

Array = NDArray[Any]

STREAM_ERRORS = (OSError, EOFError, zlib.error)
"""What reading a broken file or gzip stream raises."""

SCANNER = 1
"""The sform and qform code of coordinates that are the scanner's own."""

NIFTI1_MAX = 32767
"""Voxels per axis that the 16 bits of a NIfTI-1 header can hold."""


@dataclass(frozen=True, slots=True)
class Orientation:
    """Which storage axis each canonical axis is, and whether it runs backwards."""

    axes: tuple[int, int, int]
    """Storage axis (0 = i, 1 = j, 2 = k) of canonical z, y and x."""

    flips: tuple[bool, bool, bool]
    """True where canonical z, y or x runs against its storage axis."""

    def __post_init__(self) -> None:
        if sorted(self.axes) != [0, 1, 2]:
            raise SourceError(f"an orientation needs each storage axis once, got {self.axes}")

    @classmethod
    def from_affine(cls, affine: NDArray[np.float64]) -> Orientation:
        """The axis-aligned order closest to a (4, 4) affine that maps ijk to the patient."""
        world_of = nib.io_orientation(affine)
        storage_of = [int(np.flatnonzero(world_of[:, 0] == world)[0]) for world in (2, 1, 0)]
        flips = [bool(world_of[axis, 1] < 0) for axis in storage_of]
        return cls((storage_of[0], storage_of[1], storage_of[2]), (flips[0], flips[1], flips[2]))

    def canonical(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Per-axis values (shape, spacing) in storage order (i, j, k), reordered to (z, y, x)."""
        return tuple(values[axis] for axis in self.axes)

    def to_storage(self, region: Region, *, shape_zyx: Shape) -> Region:
        """The box of (i, j, k) that holds the canonical ``region`` of a volume of this shape."""
        start, stop = [0] * 3, [0] * 3
        for canonical, (axis, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            a, b, length = region.start[canonical], region.stop[canonical], shape_zyx[canonical]
            start[axis], stop[axis] = (length - b, length - a) if flip else (a, b)
        return Region(tuple(start), tuple(stop))

    def to_canonical(self, region: Region, *, shape_zyx: Shape) -> Region:
        """The box of (z, y, x) that holds the storage ``region``: undoes ``to_storage``."""
        start, stop = [], []
        for axis, flip, length in zip(self.axes, self.flips, shape_zyx, strict=True):
            a, b = region.start[axis], region.stop[axis]
            start.append(length - b if flip else a)
            stop.append(length - a if flip else b)
        return Region(tuple(start), tuple(stop))

    def arrange(self, array_ijk: Array) -> Array:
        """An (i, j, k) array as (z, y, x): a view."""
        return np.flip(array_ijk.transpose(self.axes), axis=self._flipped)

    def restore(self, array_zyx: Array) -> Array:
        """A (z, y, x) array as (i, j, k): a view; undoes ``arrange``."""
        return np.flip(array_zyx, axis=self._flipped).transpose(np.argsort(self.axes))

    @property
    def _flipped(self) -> tuple[int, ...]:
        return tuple(axis for axis, flip in enumerate(self.flips) if flip)


@dataclass(frozen=True, slots=True, eq=False)
class VolumeGrid:
    """Where a volume's voxels lie, as a NIfTI header says it: what its mask takes over."""

    header: Any
    """A NIfTI-1 or NIfTI-2 header; its geometry fields are copied bit for bit."""

    shape_ijk: tuple[int, int, int]
    orientation: Orientation

    @classmethod
    def from_header(cls, header: Any, *, path: Path) -> VolumeGrid:
        """The grid of a file with this unrepaired header. Raises SourceError."""
        orientation = Orientation.from_affine(best_affine(header, path=path))
        return cls(header, grid_shape(header, path=path), orientation)

    @classmethod
    def from_affine(cls, affine: Array, *, shape_ijk: tuple[int, int, int]) -> VolumeGrid:
        """The grid of a volume that is no NIfTI.

        Args:
            affine: (4, 4), ijk to the patient in mm, right-anterior-superior, axes orthogonal.
            shape_ijk: voxels along i, j and k.
        """
        kind = nib.Nifti1Header if max(shape_ijk) <= NIFTI1_MAX else nib.Nifti2Header
        header = kind(endianness="<")
        header.set_data_shape(shape_ijk)
        header.set_sform(affine, code=SCANNER)
        header.set_qform(affine, code=SCANNER)
        header.set_xyzt_units("mm")
        return cls(header, shape_ijk, Orientation.from_affine(affine))

    def slabs(self, thickness: int) -> Iterator[tuple[Region, Region]]:
        """Storage slabs along k, in file order, each with its canonical region."""
        shape_zyx = self.orientation.canonical(self.shape_ijk)
        for slab in Region.whole(self.shape_ijk).blocks((*self.shape_ijk[:2], thickness)):
            yield slab, self.orientation.to_canonical(slab, shape_zyx=shape_zyx)


class VolumeSource(Source, Protocol):
    """A source with three axes, whose mask is written as NIfTI."""

    @property
    def grid(self) -> VolumeGrid:
        """What its mask takes over. Raises SourceError."""


def is_gzip(path: Path) -> bool:
    """Whether the name says that the file is compressed."""
    return path.name.lower().endswith(".gz")


def open_stream(path: Path) -> IO[bytes]:
    """The uncompressed bytes of a ``.nii`` or ``.nii.gz`` file."""
    return cast("IO[bytes]", gzip.open(path, "rb") if is_gzip(path) else path.open("rb"))


def read_header(path: Path) -> Any:
    """The header as it stands in the file: nibabel's type, but with nothing repaired.

    Raises:
        SourceError: the file is missing, unreadable, or no single-file NIfTI-1 or NIfTI-2.
    """
    try:
        with open_stream(path) as stream:
            block = stream.read(nib.Nifti2Header.sizeof_hdr)
    except STREAM_ERRORS as error:
        raise SourceError(f"cannot read the header of {path}: {error}") from error
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.sizeof_hdr in _sizes(block) and len(block) >= kind.sizeof_hdr:
            header = kind(block[: kind.sizeof_hdr], check=False)
            if bytes(header["magic"])[:3] == header.single_magic[:3]:
                return header
    raise SourceError(f"{path} is not a single-file NIfTI-1 or NIfTI-2 image")


def _sizes(block: bytes) -> tuple[int, int]:
    return int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big")


def grid_shape(header: Any, *, path: Path) -> tuple[int, int, int]:
    """Voxels along i, j and k. Raises SourceError for an image that is not a volume."""
    shape = tuple(int(n) for n in header.get_data_shape())
    if len(shape) < 3 or min(shape) < 1:
        raise SourceError(f"{path} has shape {shape}; a volume needs three axes of at least 1")
    return shape[0], shape[1], shape[2]


def best_affine(header: Any, *, path: Path) -> NDArray[np.float64]:
    """(4, 4) float64, ijk to patient in the file's unit: the sform if coded, else the qform.

    Raises:
        SourceError: the affine is not finite or flattens the volume, or a voxel has no size.
    """
    zooms = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    if not (np.isfinite(zooms).all() and (zooms > 0).all()):
        raise SourceError(f"{path} has voxels of {zooms.tolist()}; sizes must be positive")
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError) as error:
        raise SourceError(f"{path} has an affine that cannot be read: {error}") from error
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise SourceError(
            f"{path} has an affine that is not finite or not invertible: {affine.tolist()}"
        )
    return affine


def copy_stream(source: IO[bytes], sink: IO[bytes], *, expected_bytes: int, limit: int) -> None:
    """Copy a whole stream of at least ``expected_bytes`` and at most ``limit``.

    Raises:
        SourceReadError: the stream is shorter or longer.
    """
    copied = 0
    while piece := source.read(1 << 20):
        copied += len(piece)
        if copied > limit:
            raise SourceReadError(
                f"the compressed stream holds more than the {expected_bytes} bytes of its header"
            )
        sink.write(piece)
    if copied < expected_bytes:
        raise SourceReadError(
            f"the compressed stream ends after {copied} of {expected_bytes} bytes"
        )
