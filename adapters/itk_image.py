"""NRRD and MetaImage volumes as a Source, through SimpleITK, in canonical (z, y, x) order.

Axes in array names: C channel (always one), Z Y X canonical space; K J I the file's own order, i
fastest.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from adapters.nifti_header import Orientation, VolumeGrid
from adapters.scratch_file import content_name, damage, make_once
from pipeline.domain import ImageInfo, Region, Shape
from pipeline.errors import SourceError, SourceReadError
from pipeline.ports import Block

DTYPES = {
    SimpleITK.sitkInt8: "int8",
    SimpleITK.sitkUInt8: "uint8",
    SimpleITK.sitkInt16: "int16",
    SimpleITK.sitkUInt16: "uint16",
    SimpleITK.sitkInt32: "int32",
    SimpleITK.sitkUInt32: "uint32",
    SimpleITK.sitkInt64: "int64",
    SimpleITK.sitkUInt64: "uint64",
    SimpleITK.sitkFloat32: "float32",
    SimpleITK.sitkFloat64: "float64",
}

HEADER_BYTES = 1 << 20
"""A header that does not end within this is no header."""

ORTHOGONAL_TOL = 1e-3
"""How far axes may be from unit length and right angles: a mask's qform could not say more."""

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


NRRD_SPACES = (
    *("left-posterior-superior", "right-anterior-superior", "left-anterior-superior"),
    *("lps", "ras", "las"),
)
"""Those that ITK turns into its own; it takes any other, and none, for the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """How the voxels lie in the file."""

    files: tuple[Path, ...]
    """The file, and the one that holds its voxels where that is another."""

    random_access: bool
    """Whether a region can be read without the rest of the file."""

    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """What the file says before its voxels."""

    shape_ijk: tuple[int, int, int]
    dtype: str
    affine: tuple[float, ...]
    """16 numbers, row-major: ijk to the patient in mm, right-anterior-superior."""

    layout: _Layout


@dataclass(frozen=True)
class ItkImage:
    """One 3-D volume of grey values in a ``.nrrd``, ``.mha`` or ``.mhd`` file.

    Only an uncompressed MetaImage is random access. Of another file every read is a read of the
    whole; with a scratch folder that happens once, and every process maps the plain values.
    """

    path: Path

    _: KW_ONLY

    scratch: Path | None = None
    """Folder shared by all readers of this run, for the plain values."""

    @cached_property
    def info(self) -> ImageInfo:
        """Shape, spacing in mm and affine. Raises SourceError."""
        header = self._header
        affine = np.reshape(header.affine, (4, 4))
        spacing_ijk = tuple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0))
        note = "not random access: it is read whole into memory once"
        return ImageInfo(
            shape=self._shape_zyx,
            axes=("z", "y", "x"),
            channels=("1",),
            dtype=header.dtype,
            nodata=(None,),
            spacing=self._orientation.canonical(spacing_ijk),
            unit="mm",
            affine=header.affine,
            notes=header.layout.notes + (() if header.layout.random_access else (note,)),
        )

    @property
    def grid(self) -> VolumeGrid:
        """What a mask of this volume takes over. Raises SourceError."""
        affine = np.reshape(self._header.affine, (4, 4))
        return VolumeGrid.from_affine(affine, shape_ijk=self._header.shape_ijk)

    def unpack(self) -> None:
        """Write the plain values into scratch. Raises SourceError or SourceReadError."""
        if self.scratch is None or self._header.layout.random_access:
            return
        try:
            self._mapped(self.scratch)
        except OSError as error:
            raise damage(error, of=self.path) from error
        except RuntimeError as error:
            raise SourceError(f"{self.path} is damaged, fetch it again: {_line(error)}") from error

    def read(self, region: Region) -> Block:
        """``region`` in canonical order: (1, Z, Y, X) native dtype; new.

        Raises:
            SourceReadError: the file is truncated or corrupt.
        """
        box = self._orientation.to_storage(region, shape_zyx=self._shape_zyx)
        inside = Region.whole(self._header.shape_ijk)
        index_ijk = box.slices(within=inside)
        try:
            if self.scratch is None or self._header.layout.random_access:
                stored_KJI = self._extract(box)
            else:
                stored_KJI = self._mapped(self.scratch)[index_ijk[::-1]]
        except (OSError, RuntimeError) as error:
            raise SourceReadError(f"cannot read {region} of {self.path}: {_line(error)}") from error
        image_ZYX = self._orientation.arrange(stored_KJI.T).astype(self._header.dtype, order="C")
        return Block(image_ZYX[np.newaxis], np.isfinite(image_ZYX))

    def digest(self) -> str:
        """SHA-256 over the bytes of the file, and of its data file. Raises SourceReadError."""
        total = hashlib.sha256()
        for path in self._header.layout.files:
            try:
                with path.open("rb") as file:
                    total.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise SourceReadError(f"cannot read {path}: {error}") from error
        return total.hexdigest()

    @cached_property
    def _header(self) -> _Header:
        layout = _layout(self.path)
        reader = _reader(self.path)
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:
            raise SourceError(f"cannot read the header of {self.path}: {_line(error)}") from error
        shape, kind = tuple(int(n) for n in reader.GetSize()), reader.GetPixelID()
        if len(shape) != 3 or min(shape) < 1 or reader.GetNumberOfComponents() != 1:
            raise SourceError(
                f"{self.path} has size {shape}, {reader.GetNumberOfComponents()} values per voxel;"
                " a volume needs three axes and one value"
            )
        if kind not in DTYPES:
            name = SimpleITK.GetPixelIDValueAsString(kind)
            raise SourceError(f"{self.path} holds {name}; whole numbers or floats can be read")
        return _Header(
            shape_ijk=(shape[0], shape[1], shape[2]),
            dtype=DTYPES[kind],
            affine=_affine(reader, path=self.path),
            layout=layout,
        )

    @cached_property
    def _orientation(self) -> Orientation:
        return Orientation.from_affine(np.reshape(self._header.affine, (4, 4)))

    @property
    def _shape_zyx(self) -> Shape:
        return self._orientation.canonical(self._header.shape_ijk)

    def _extract(self, box_ijk: Region) -> NDArray[Any]:
        reader = _reader(self.path)
        reader.SetExtractIndex(box_ijk.start)
        reader.SetExtractSize(box_ijk.shape)
        stored_KJI: NDArray[Any] = SimpleITK.GetArrayFromImage(reader.Execute())
        return stored_KJI

    def _mapped(self, scratch: Path) -> NDArray[Any]:
        plain = scratch / content_name(self._header.layout.files, suffix=".raw")
        make_once(plain, write=self._unpack)
        # Mapped anew for each read: pages that stay mapped would count as this process's memory.
        shape_KJI = self._header.shape_ijk[::-1]
        return np.memmap(plain, self._header.dtype, mode="r", shape=shape_KJI)

    def _unpack(self, sink: IO[bytes]) -> None:
        image = _reader(self.path).Execute()
        sink.write(SimpleITK.GetArrayViewFromImage(image).data)


def _is_meta(path: Path) -> bool:
    return path.suffix.lower() != ".nrrd"


def _reader(path: Path) -> Any:
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("MetaImageIO" if _is_meta(path) else "NrrdImageIO")
    reader.SetFileName(str(path))
    return reader


def _line(error: Exception) -> str:
    """The last line of an ITK exception, which says what is wrong."""
    return str(error).strip().splitlines()[-1].strip()


def _affine(reader: Any, *, path: Path) -> tuple[float, ...]:
    direction = np.reshape(reader.GetDirection(), (3, 3))
    spacing, origin = np.array(reader.GetSpacing()), np.array(reader.GetOrigin())
    if not all(np.isfinite(part).all() for part in (direction, spacing, origin)):
        raise SourceError(f"{path} has an origin, spacing or direction that is not finite")
    if spacing.min() <= 0:
        raise SourceError(f"{path} has voxels of {spacing.tolist()} mm; sizes must be positive")
    off = float(np.abs(direction.T @ direction - np.eye(3)).max())
    if off > ORTHOGONAL_TOL:
        raise SourceError(
            f"{path} has axes that are not at right angles: off by {off:.2g}, tolerance"
            f" {ORTHOGONAL_TOL}; resample it first"
        )
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = direction * spacing, origin
    return tuple(float(a) for a in (LPS_TO_RAS @ affine).ravel())


def _layout(path: Path) -> _Layout:
    """Refuses a file whose voxels lie in some other folder's file. Raises SourceError."""
    fields = _fields(path)
    if not _is_meta(path):
        space = fields.get("space", "").lower()
        note = f"space {space!r}: axes are taken as left, posterior, superior"
        notes = () if space in NRRD_SPACES else (note,)
        name = fields.get("data file") or fields.get("datafile") or "LOCAL"
        layout = _Layout(files=(path,), random_access=False, notes=notes)
    else:
        plain = fields.get("CompressedData", "False").lower() == "false"
        name = fields.get("ElementDataFile", "")
        layout = _Layout(files=(path,), random_access=plain, notes=())
    if name == "LOCAL":
        return layout
    data = path.parent / name
    beside = data.is_file() and data.resolve().parent == path.parent.resolve()
    if path.suffix.lower() != ".mhd" or not beside:
        raise SourceError(
            f"{path} says that its voxels are in {name!r}; only an .mhd may have them in another"
            " file, and that lies beside it"
        )
    return replace(layout, files=(path, data))


def _fields(path: Path) -> dict[str, str]:
    """The header's lines; NRRD knows its fields in any case, MetaImage in one."""
    fields: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            lines = file.read(HEADER_BYTES).split(b"\n")
    except OSError as error:
        raise SourceError(f"cannot read the header of {path}: {error}") from error
    for line in lines:
        text = line.decode("latin-1").rstrip()
        key, _, value = re.sub("[=:]" if _is_meta(path) else ":", "\n", text, count=1).partition(
            "\n"
        )
        key = key.strip() if _is_meta(path) else key.strip().lower()
        if not text or key == "ElementDataFile":
            return {**fields, key: value.strip()}
        fields[key] = value.strip()
    raise SourceError(f"{path} has a header that does not end; it is no {path.suffix} file")
