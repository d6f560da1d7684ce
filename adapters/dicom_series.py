"""A DICOM series as a Source: slices sorted in space, in canonical (z, y, x) order.

Axes in array names: C channel (always one), Z Y X canonical space; K J I the series' own order,
slice, row and column.
"""

from __future__ import annotations

import hashlib
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from adapters.dicom_folder import read_slices
from adapters.dicom_geometry import SliceStack, stack_slices
from adapters.dicom_slice import read_pixels
from adapters.nifti_header import Orientation, VolumeGrid
from adapters.scratch_file import content_name, damage, make_once
from pipeline.domain import ImageInfo, Region, Shape
from pipeline.errors import SourceReadError
from pipeline.ports import Block


@dataclass(frozen=True)
class DicomSeries:
    """One image series of a folder of single-frame DICOM files.

    A file is decoded whole, however little of it is read: with a scratch folder the series is
    decoded there once, by whoever first reads, and mapped by every process.
    """

    folder: Path
    uid: str | None = None
    """SeriesInstanceUID; None where the folder holds one series."""

    _: KW_ONLY

    scratch: Path | None = None
    """Folder shared by all readers of this run, for the decoded series."""

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: headers of thousands of slices do not travel with each tile."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def info(self) -> ImageInfo:
        """Shape, spacing in mm and affine. Raises SourceError with the verdict on the series."""
        stack, orientation = self._stack, self._orientation
        affine = np.reshape(stack.affine, (4, 4))
        spacing_ijk = tuple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0))
        uid, count, _ = self._headers
        return ImageInfo(
            shape=self._shape_zyx,
            axes=("z", "y", "x"),
            channels=("1",),
            dtype="float32" if _is_rescaled(stack) else stack.slices[0].dtype,
            nodata=(None,),
            spacing=orientation.canonical(spacing_ijk),
            unit="mm",
            affine=stack.affine,
            modality=stack.slices[0].modality or None,
            selection=f"series {uid} of {count}" if count > 1 else None,
            notes=stack.notes + _notes(stack),
        )

    @property
    def grid(self) -> VolumeGrid:
        """What a mask of this series takes over. Raises SourceError."""
        affine = np.reshape(self._stack.affine, (4, 4))
        return VolumeGrid.from_affine(affine, shape_ijk=self._stack.shape_ijk)

    def unpack(self) -> None:
        """Decode all slices into scratch. Raises SourceError or SourceReadError."""
        if self.scratch is None:
            return
        try:
            self._decoded(self.scratch)
        except OSError as error:
            raise damage(error, of=self.folder) from error

    def read(self, region: Region) -> Block:
        """``region`` in canonical order: (1, Z, Y, X), float32 where rescaled; new.

        Padding is invalid. MONOCHROME1 values are as stored, not inverted.

        Raises:
            SourceReadError: a slice is truncated or corrupt.
        """
        stack = self._stack
        box = self._orientation.to_storage(region, shape_zyx=self._shape_zyx)
        index_ijk = box.slices(within=Region.whole(stack.shape_ijk))
        try:
            stored_KJI = self._stored(index_ijk[::-1])
        except OSError as error:
            raise SourceReadError(f"cannot read {region} of {self.folder}: {error}") from error
        image_KJI = np.empty(stored_KJI.shape, self.info.dtype)
        valid_KJI = np.empty(stored_KJI.shape, np.bool_)
        for k, header in enumerate(stack.slices[index_ijk[2]]):
            stored_JI = stored_KJI[k]
            if _is_rescaled(stack):
                image_KJI[k] = stored_JI * np.float64(header.slope) + header.inter
            else:
                image_KJI[k] = stored_JI
            low, high = header.padding or (1, 0)
            valid_KJI[k] = (stored_JI < low) | (stored_JI > high)
        image_ZYX, valid_ZYX = (
            np.ascontiguousarray(self._orientation.arrange(array_KJI.T))
            for array_KJI in (image_KJI, valid_KJI)
        )
        return Block(image_ZYX[np.newaxis], valid_ZYX)

    def digest(self) -> str:
        """SHA-256 over the slices' files in their order in space. Raises SourceReadError."""
        total = hashlib.sha256()
        for header in self._stack.slices:
            try:
                with header.path.open("rb") as file:
                    total.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise SourceReadError(f"cannot read {header.path}: {error}") from error
        return total.hexdigest()

    @cached_property
    def _headers(self) -> tuple[str, int, SliceStack]:
        uid, count, slices = read_slices(self.folder, uid=self.uid)
        return uid, count, stack_slices(slices, folder=self.folder)

    @property
    def _stack(self) -> SliceStack:
        return self._headers[2]

    @cached_property
    def _orientation(self) -> Orientation:
        return Orientation.from_affine(np.reshape(self._stack.affine, (4, 4)))

    @property
    def _shape_zyx(self) -> Shape:
        return self._orientation.canonical(self._stack.shape_ijk)

    def _stored(self, index_KJI: tuple[slice, ...]) -> NDArray[Any]:
        """Values as stored, (K, J, I); may alias the mapped file."""
        slices = self._stack.slices
        if self.scratch is None:
            chosen = slices[index_KJI[0]]
            return np.stack([read_pixels(header)[index_KJI[1:]] for header in chosen])
        plain = self._decoded(self.scratch)
        # Mapped anew for each read: pages that stay mapped would count as this process's memory.
        shape_KJI = self._stack.shape_ijk[::-1]
        return np.memmap(plain, slices[0].dtype, mode="r", shape=shape_KJI)[index_KJI]

    @cached_property
    def _plain_name(self) -> str:
        """Once for all tiles: over a network, asking hundreds of files their time is slow."""
        return content_name((header.path for header in self._stack.slices), suffix=".raw")

    def _decoded(self, scratch: Path) -> Path:
        return make_once(scratch / self._plain_name, write=self._decode)

    def _decode(self, sink: IO[bytes]) -> None:
        for header in self._stack.slices:
            sink.write(read_pixels(header).tobytes())


def _is_rescaled(stack: SliceStack) -> bool:
    return any((header.slope, header.inter) != (1.0, 0.0) for header in stack.slices)


def _notes(stack: SliceStack) -> tuple[str, ...]:
    notes = []
    if any(header.inverted for header in stack.slices):
        notes.append("MONOCHROME1: low values are shown bright; values are taken as stored")
    if any(header.lossy for header in stack.slices):
        notes.append("the pixels went through lossy compression")
    padding = sorted({header.padding for header in stack.slices if header.padding})
    if padding:
        low, high = padding[0][0], padding[-1][1]
        which = f"{low}" if low == high else f"{low} to {high}"
        notes.append(f"pixel padding (stored value {which}) is not data")
    return tuple(notes)
