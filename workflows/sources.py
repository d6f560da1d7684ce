"""What a batch is about: files, folders, globs and lists, each source with an id of its own."""

from __future__ import annotations

import csv
import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.uri import is_known
from pipeline.domain import check_case_id
from pipeline.errors import PlanError, SourceError
from workflows.case import stem

SEPARATOR = "__"
"""Between the folders in an id: they keep two files of one name apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A source that was found, not opened yet."""

    id: str
    path: Path
    """Absolute; a file, or the folder of a DICOM series."""

    series: str | None = None
    """SeriesInstanceUID, where the folder holds several."""

    refused: str = ""
    """Why it cannot be a case at all; empty where it can be tried."""

    def stamp(self) -> str:
        """What changes when the content may have changed: sizes and times of its files, hashed.

        Empty for a file that names others (.vrt, .mhd): its own time says nothing about them.
        Raises SourceError for a source that is not there.
        """
        path = self.path
        if path.name.lower().endswith((".vrt", ".mhd")):
            return ""
        if path.is_dir():
            return stamp(sorted(file for file in path.iterdir() if file.is_file()))
        return stamp(sorted(path.parent.glob(f"{glob.escape(path.name)}*")) or [path])


def stamp(files: Sequence[Path]) -> str:
    """SHA-256 over path, size, time and mode. Raises SourceError for a file that is gone."""
    digest = hashlib.sha256()
    for file in files:
        try:
            facts = file.stat()
        except OSError as error:
            raise SourceError(f"{file} cannot be read: {error.strerror}") from error
        values = (str(file.resolve()), facts.st_size, facts.st_mtime_ns, facts.st_mode)
        digest.update(repr(values).encode())
    return digest.hexdigest()


def find_sources(asked: Sequence[str | Path], *, leave_out: Iterable[Path]) -> list[Candidate]:
    """Everything that is asked for, by id.

    Args:
        asked: Files, folders (walked; hidden ones and run directories passed over), globs, and
            ``.csv`` lists with the columns ``id`` and ``path``, paths relative to the list.
        leave_out: Where results go: what lies there is no source.

    Raises:
        PlanError: a list that cannot be read.
    """
    outside = [folder.resolve() for folder in leave_out]
    found: dict[str, Candidate] = {}
    refused: list[Candidate] = []
    for candidate in _all(asked, outside):
        first = found.setdefault(candidate.id, candidate)
        if first.path != candidate.path or first.series != candidate.series:
            reason = f"the id is taken by {first.path}: give ids of your own in a CSV list"
            refused.append(Candidate(id=candidate.id, path=candidate.path, refused=reason))
    return [*found.values(), *refused]


def _all(asked: Sequence[str | Path], outside: list[Path]) -> Iterator[Candidate]:
    for source in asked:
        text, path = str(source), Path(source).absolute()
        if path.is_dir():
            yield from _walk(path, outside)
        elif text.lower().endswith(".csv"):
            yield from _listed(path)
        elif path.exists() or not glob.has_magic(text):
            yield Candidate(id=_id([stem(path.name)]), path=path)
        else:
            for hit in sorted(glob.glob(str(path), recursive=True)):
                inside = Path(hit)
                if inside.is_dir():
                    yield from _walk(inside, outside)
                elif is_known(inside.name) and not _within(inside, outside):
                    yield Candidate(id=_id([stem(inside.name)]), path=inside)


def _walk(top: Path, outside: list[Path]) -> Iterator[Candidate]:
    for here, folders, names in os.walk(top):
        folder = Path(here)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and _is_source(folder / n))
        folders[:] = [n for n in folders if not _within(folder / n, outside)]
        parts = list(folder.relative_to(top).parts)
        for name in sorted(names):
            if is_known(name) and not name.startswith("."):
                yield Candidate(id=_id([*parts, stem(name)]), path=folder / name)
        yield from _series(folder, parts or [top.name])


def _series(folder: Path, parts: list[str]) -> Iterator[Candidate]:
    from adapters.dicom_folder import find_series, is_dicom_folder

    if not is_dicom_folder(folder):
        return
    try:
        series = find_series(folder)
    except SourceError as error:
        yield Candidate(id=_id(parts), path=folder, refused=str(error))
        return
    for one in series:
        alone = len(series) == 1
        yield Candidate(
            id=_id(parts if alone else [*parts, one.uid]),
            path=folder,
            series=None if alone else one.uid,
        )


def _listed(path: Path) -> Iterator[Candidate]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PlanError(f"the list {path} cannot be read: {error}") from error
    for number, row in enumerate(rows, start=2):
        case, source = (row.get("id") or "").strip(), (row.get("path") or "").strip()
        if not case or not source:
            raise PlanError(
                f"the list {path}, line {number}: needs the columns id and path, filled"
            )
        absolute = Path(os.path.abspath(path.parent / source))
        try:
            yield Candidate(id=check_case_id(case), path=absolute)
        except PlanError as error:
            yield Candidate(id=case, path=absolute, refused=str(error))


def _id(parts: Sequence[str]) -> str:
    """Names of folders and file as one id; what cannot stand in it becomes an underscore.

    >>> _id(["patient 7", "ct"])
    'patient_7__ct'
    """
    text = SEPARATOR.join(re.sub(r"[^A-Za-z0-9._-]", "_", part) for part in parts)
    return re.sub(r"\.{2,}", ".", text.lstrip("._-"))[:128] or "case"


def _is_source(folder: Path) -> bool:
    """False for the run directory of a segmentation, and for a Zarr store."""
    return not (folder / "lease.lock").exists() and not (folder / "zarr.json").exists()


def _within(path: Path, outside: list[Path]) -> bool:
    real = path.resolve()
    return any(real == folder or folder in real.parents for folder in outside)
