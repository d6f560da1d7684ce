"""What a single-frame DICOM file says of its slice, and the slice itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import pixel_array

from adapters.dicom_file import DICOM_ERRORS, DicomFile, transfer_syntax
from pipeline.errors import SourceError, SourceReadError

SLICE_PIXELS = 1 << 28
"""More in one slice is taken for a damaged or hostile header."""

FARTHEST_MM = 1e6
"""The same for a distance."""

LARGEST_VALUE = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceHeader:
    """What one file says of its slice."""

    path: Path
    shape_YX: tuple[int, int]
    dtype: str
    """Of the values as stored, before the rescale."""

    position: tuple[float, ...]
    """Centre of the first pixel (x, y, z) in the patient, mm, left-posterior-superior."""

    orientation: tuple[float, ...]
    """Direction in which columns count up (x, y, z), then rows: two unit vectors, orthogonal."""

    spacing_YX: tuple[float, float]
    """Between rows, between columns, in mm."""

    thickness: float | None
    """In mm; None where the file states none."""

    modality: str
    frame_of_reference: str
    slope: float
    inter: float
    """A value is ``slope * stored + inter``."""

    padding: tuple[int, int] | None
    """Lowest and highest stored value that mean: no data."""

    inverted: bool
    """MONOCHROME1: low values are shown bright."""

    lossy: bool


def slice_header(file: DicomFile) -> SliceHeader:
    """The checked values of an image file."""
    _check_kind(file)
    rows, columns = (int(file.number(name)) for name in ("Rows", "Columns"))
    if min(rows, columns) < 1 or rows * columns > SLICE_PIXELS:
        raise SourceError(
            f"{file.path} has {rows} rows and {columns} columns;"
            f" 1 to {SLICE_PIXELS} pixels can be read"
        )
    dtype = _dtype(file)
    _check_pixels(file, expected_bytes=rows * columns * np.dtype(dtype).itemsize)
    if not all(file.has(f"Image{name}Patient") for name in ("Position", "Orientation")):
        raise SourceError(
            f"{file.path} has no position in the patient: a scout or a screenshot, not a slice;"
            " take it out of the folder"
        )
    position = file.numbers("ImagePositionPatient", count=3)
    between_rows, between_columns = file.numbers("PixelSpacing", count=2)
    if min(between_rows, between_columns) <= 0:
        raise SourceError(f"{file.path} has pixels of {between_rows} x {between_columns} mm")
    if max(between_rows, between_columns, *map(abs, position)) > FARTHEST_MM:
        raise SourceError(f"{file.path} has a position or pixel size beyond {FARTHEST_MM:g} mm")
    slope, inter = _rescale(file)
    return SliceHeader(
        path=file.path,
        shape_YX=(rows, columns),
        dtype=dtype,
        position=position,
        orientation=_orientation(file),
        spacing_YX=(between_rows, between_columns),
        thickness=file.optional("SliceThickness"),
        modality=file.text("Modality"),
        frame_of_reference=file.text("FrameOfReferenceUID"),
        slope=slope,
        inter=inter,
        padding=_padding(file, dtype=np.dtype(dtype)),
        inverted=file.text("PhotometricInterpretation") == "MONOCHROME1",
        lossy=file.text("LossyImageCompression") == "01",
    )


def _check_kind(file: DicomFile) -> None:
    frames = file.optional("NumberOfFrames") or 1
    if frames != 1 or "Enhanced" in file.kind:
        raise SourceError(
            f"{file.path} is a multi-frame object of {frames:.0f} frames, which are not read yet;"
            " convert it to single-frame DICOM or to NIfTI"
        )
    samples = file.optional("SamplesPerPixel") or 1
    photometric = file.text("PhotometricInterpretation")
    if samples != 1 or not photometric.startswith("MONOCHROME"):
        raise SourceError(
            f"{file.path} is a colour image ({samples:.0f} samples per pixel, {photometric});"
            " grey values are read"
        )
    if "ModalityLUTSequence" in file.dataset:
        raise SourceError(
            f"{file.path} has a modality lookup table; only slope and intercept are read"
        )


def _check_pixels(file: DicomFile, *, expected_bytes: int) -> None:
    """Refuse at once what would fail slice by slice later."""
    syntax = file.syntax
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise SourceError(f"{file.path} has pixels encoded as {syntax.name}, not known") from error
    if not decoder.is_available:
        needs = "; or ".join(decoder.missing_dependencies)
        raise SourceError(f"{file.path} has pixels compressed as {syntax.name}; install {needs}")
    tag_bytes = 8 if syntax.is_implicit_VR else 12
    expected, found = file.pixels_at + tag_bytes + expected_bytes, file.path.stat().st_size
    if not syntax.is_compressed and found < expected:
        raise SourceError(f"{file.path} is cut short: {found} bytes of {expected}; fetch it again")


def _dtype(file: DicomFile) -> str:
    bits = int(file.number("BitsAllocated"))
    signed = int(file.number("PixelRepresentation"))
    if bits not in (8, 16, 32) or signed not in (0, 1):
        raise SourceError(
            f"{file.path} stores {bits} bits per pixel, representation {signed}; 8, 16 or 32 bits,"
            " 0 or 1, can be read"
        )
    return f"{'int' if signed else 'uint'}{bits}"


def _orientation(file: DicomFile) -> tuple[float, ...]:
    orientation = file.numbers("ImageOrientationPatient", count=6)
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    off = max(abs(row @ row - 1), abs(column @ column - 1), abs(row @ column))
    if off > 1e-3:
        raise SourceError(
            f"{file.path} has row and column directions {orientation}, which are no orthogonal unit"
            f" vectors: off by {off:.2g}, tolerance 0.001"
        )
    return orientation


def _rescale(file: DicomFile) -> tuple[float, float]:
    slope, inter = (file.optional(f"Rescale{name}") for name in ("Slope", "Intercept"))
    slope, inter = 1.0 if slope is None else slope, inter or 0.0
    if slope == 0 or abs(slope) * 2**32 + abs(inter) > LARGEST_VALUE:
        raise SourceError(
            f"{file.path} has a rescale slope of {slope:g} and intercept of {inter:g}: its values"
            " would all be one, or leave float32"
        )
    return slope, inter


def _padding(file: DicomFile, *, dtype: np.dtype[Any]) -> tuple[int, int] | None:
    value = file.optional("PixelPaddingValue")
    if value is None:
        return None
    limit = file.optional("PixelPaddingRangeLimit")
    ends = [_as_stored(end, dtype=dtype) for end in (value, value if limit is None else limit)]
    return min(ends), max(ends)


def _as_stored(value: float, *, dtype: np.dtype[Any]) -> int:
    """Undo what many writers do: the bits of a signed value stated as unsigned, or vice versa."""
    count = 1 << (8 * dtype.itemsize)
    bits = int(value) % count
    return bits - count if dtype.kind == "i" and bits >= count // 2 else bits


def read_pixels(header: SliceHeader) -> NDArray[Any]:
    """(Y, X) as stored, native byte order; a new array.

    Raises:
        SourceReadError: the pixel data is truncated, corrupt or not what the header says.
    """
    try:
        dataset = pydicom.dcmread(header.path, force=True)
        dataset.file_meta.TransferSyntaxUID = transfer_syntax(dataset)
        stored_YX: NDArray[Any] = pixel_array(dataset, raw=True)
    except DICOM_ERRORS as error:
        why = " ".join(str(error).split())
        raise SourceReadError(f"cannot decode {header.path}: {why}; fetch it again") from error
    found, asked = (stored_YX.shape, stored_YX.dtype.name), (header.shape_YX, header.dtype)
    if found != asked:
        raise SourceReadError(f"{header.path} decodes to {found}, its header says {asked}")
    return stored_YX.astype(header.dtype)
