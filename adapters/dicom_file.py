"""The header of one DICOM file, from a stranger: every value is checked when it is taken.

Read are the tags listed here and no others: no name, no date, no free text of a patient.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
import pydicom.config
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from pipeline.errors import SourceError

# Else pydicom warns of a malformed value by quoting it; what is used is checked here.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

DICOM_ERRORS = (
    InvalidDicomError,
    BytesLengthException,
    OSError,
    EOFError,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    RuntimeError,
    struct.error,
    zlib.error,
)
"""What pydicom and its decoders raise for a damaged file."""

TAGS = (
    "SOPClassUID",
    "Modality",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "PixelRepresentation",
    "PixelSpacing",
    "SliceThickness",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "ModalityLUTSequence",
    "RescaleSlope",
    "RescaleIntercept",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "LossyImageCompression",
)

DEFLATED = DeflatedExplicitVRLittleEndian.encode()
META_BYTES = 1024
"""The transfer syntax lies within these first bytes of a file."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DicomFile:
    """The data set of a file up to its pixels."""

    path: Path
    dataset: Any
    pixels_at: int
    """Byte where the pixel data begins; the end of a file that has none."""

    @classmethod
    def open(cls, path: Path) -> DicomFile:
        """Read the header. Raises SourceError for a file that is damaged, or deflated."""
        try:
            with path.open("rb") as stream:
                # The whole data set is one stream that may inflate to any size.
                deflated = DEFLATED in stream.read(META_BYTES)
                if not deflated:
                    stream.seek(0)
                    dataset = pydicom.dcmread(
                        stream, stop_before_pixels=True, specific_tags=list(TAGS), force=True
                    )
                    file = cls(path=path, dataset=dataset, pixels_at=stream.tell())
        except DICOM_ERRORS as error:
            raise SourceError(f"{path} is a damaged DICOM file; fetch it again") from error
        if deflated:
            raise SourceError(f"{path} is deflated DICOM, which is not read; rewrite it plain")
        if not (file.text("SOPClassUID") and file.text("SeriesInstanceUID")):
            raise SourceError(
                f"{path} is a damaged DICOM file: no SOPClassUID or no series; fetch it again"
            )
        if file.is_image and file.pixels_at >= path.stat().st_size:
            raise SourceError(
                f"{path} is cut short: it ends at byte {file.pixels_at}, before its pixels; fetch"
                " it again"
            )
        return file

    @property
    def is_image(self) -> bool:
        """Whether it is a picture; segmentations, doses and reports are not."""
        return "Image Storage" in self.kind

    @property
    def kind(self) -> str:
        """The name of its SOP class, ``CT Image Storage``; the UID of a private one."""
        return UID(self.text("SOPClassUID")).name

    @property
    def syntax(self) -> UID:
        """How its pixels are encoded."""
        return transfer_syntax(self.dataset)

    def text(self, name: str) -> str:
        """A code or UID on one line; empty where the tag is absent or empty."""
        try:
            value = str(self.dataset.get(name) or "")
        except DICOM_ERRORS as error:
            raise SourceError(f"{self.path} has no readable {name}; the file is damaged") from error
        return _line(value)

    def number(self, name: str) -> float:
        """One finite number. Raises SourceError."""
        return self.numbers(name, count=1)[0]

    def optional(self, name: str) -> float | None:
        """One finite number; None where the tag is absent or empty. Raises SourceError."""
        return self.number(name) if self.has(name) else None

    def has(self, name: str) -> bool:
        """Whether the tag is there and not empty. Raises SourceError."""
        return bool(self._values(name))

    def numbers(self, name: str, *, count: int) -> tuple[float, ...]:
        """``count`` finite numbers. Raises SourceError."""
        numbers = self._values(name)
        if len(numbers) != count or not all(map(math.isfinite, numbers)):
            raise SourceError(
                f"{self.path} has {name} {list(numbers[:9])}; finite numbers are needed,"
                f" {count} of them"
            )
        return numbers

    def _values(self, name: str) -> tuple[float, ...]:
        try:
            value = self.dataset.get(name)
            if value is None or value == "":
                return ()
            return tuple(float(v) for v in (value if isinstance(value, Sequence) else [value]))
        except DICOM_ERRORS as error:
            raise SourceError(f"{self.path} has no readable {name}; the file is damaged") from error


def transfer_syntax(dataset: Any) -> UID:
    """How pixels are encoded: as the header is, where a file has no meta group to say it."""
    stated = dataset.file_meta.get("TransferSyntaxUID")
    if stated is not None:
        return UID(_line(str(stated)))
    implicit, _ = dataset.original_encoding
    return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian


def _line(text: str) -> str:
    """Printable, of a UID's length at most: it may end in a message."""
    return re.sub("[^ -~]", "?", text)[:64]
