"""What lies in a folder of DICOM files: which are images, and of which series."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapters.dicom_file import DicomFile
from adapters.dicom_slice import SliceHeader, slice_header
from pipeline.errors import SourceError


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesFound:
    """One image series of a folder."""

    uid: str
    """SeriesInstanceUID."""

    modality: str
    files: tuple[Path, ...]
    """In order of name; their order in space is not known yet."""


def is_dicom_folder(folder: Path) -> bool:
    """Whether ``folder`` itself, not a folder in it, holds a DICOM file. Raises SourceError."""
    return next(_dicom_files(folder), None) is not None


def find_series(folder: Path) -> tuple[SeriesFound, ...]:
    """The image series in ``folder`` itself, by UID, from headers alone; empty where none is.

    Raises:
        SourceError: a folder that cannot be read, or that holds damaged DICOM files alone.
    """
    series, _, damaged = _image_files(folder)
    if damaged and not series:
        raise damaged[0]
    return tuple(
        SeriesFound(
            uid=uid,
            modality=files[0].text("Modality"),
            files=tuple(file.path for file in files),
        )
        for uid, files in sorted(series.items())
    )


def read_slices(folder: Path, *, uid: str | None) -> tuple[str, int, list[SliceHeader]]:
    """The UID, the number of series in ``folder``, and the headers of one, in order of name.

    Args:
        folder: where the files lie.
        uid: which series; None where the folder holds one.

    Raises:
        SourceError: no such series, several to choose from, or a header that cannot be used.
    """
    series, others, damaged = _image_files(folder)
    if damaged:  # it may be a slice of this series
        raise damaged[0]
    if not series:
        found = ", ".join(f"{count} x {kind}" for kind, count in sorted(others.items()))
        raise SourceError(
            f"{folder} holds no DICOM image; found {found or 'no DICOM file'}: give one file, or"
            " the folder of one series; a folder of many is for terravox batch"
        )
    if uid is None and len(series) > 1:
        found = "; ".join(
            f"{name} ({files[0].text('Modality')}, {len(files)} slices)"
            for name, files in sorted(series.items())
        )
        raise SourceError(
            f"{folder} holds {len(series)} series; choose one with --series UID: {found}"
        )
    if uid is not None and uid not in series:
        raise SourceError(
            f"--series {uid} asked of {folder}, which has {', '.join(sorted(series))}"
        )
    chosen = uid or next(iter(series))
    return chosen, len(series), [slice_header(file) for file in series[chosen]]


def _image_files(
    folder: Path,
) -> tuple[dict[str, list[DicomFile]], Counter[str], list[SourceError]]:
    """The image files, by series; how many other objects, by kind; what is wrong with others."""
    series: dict[str, list[DicomFile]] = defaultdict(list)
    others: Counter[str] = Counter()
    damaged = []
    for path in _dicom_files(folder):
        try:
            file = DicomFile.open(path)
        except SourceError as error:
            damaged.append(error)
            continue
        if file.is_image:
            series[file.text("SeriesInstanceUID")].append(file)
        else:
            others[file.kind] += 1
    return series, others, damaged


def _dicom_files(folder: Path) -> Iterator[Path]:
    """Files with the DICOM magic, or named as such, in order of name; no DICOMDIR."""
    try:
        for path in sorted(folder.iterdir()):
            if path.name.upper() != "DICOMDIR" and path.is_file() and _is_dicom(path):
                yield path
    except OSError as error:
        raise SourceError(f"cannot read the folder {folder}: {error}") from error


def _is_dicom(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix == ".dcm":
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:  # told when it is opened, if it is named as slices often are
        return suffix in ("", ".ima") or suffix[1:].isdigit()
