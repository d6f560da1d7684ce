"""What a batch is about: files, folders, globs and lists, each source with an id of its own."""

from __future__ import annotations

import csv
import glob
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.uri import is_known
from pipeline.domain import check_case_id
from pipeline.errors import PlanError, SourceError
from workflows.case import stem

SEPARATOR = "__"
"""Between the folders in an id: they keep two files of one name apart."""

SIDECARS = (".aux.xml", ".msk")
"""Added to a raster's name: what it says of the pixels may lie beside it."""

WORLD_FILES = (".tfw", ".tifw", ".tiffw", ".wld")
"""In place of a raster's suffix: where it lies, for one that does not say so itself."""

POINTERS = (".vrt", ".mhd")
"""Files that name others: their own time says nothing about those."""


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

        Empty for a file that names others. Raises SourceError for a source that is not there.
        """
        path = self.path
        if path.name.lower().endswith(POINTERS):
            return ""
        try:
            if path.is_dir():
                return stamp(sorted(file for file in path.iterdir() if file.is_file()))
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}") from error
        sidecars = [path.with_name(path.name + suffix) for suffix in SIDECARS]
        sidecars += [path.with_suffix(suffix) for suffix in WORLD_FILES]
        return stamp([path, *(file for file in sidecars if file.exists())])


def stamp(files: Sequence[Path]) -> str:
    """SHA-256 over path, size, time and mode. Raises SourceError for a file that is gone."""
    digest = hashlib.sha256()
    for file in files:
        try:
            facts = file.stat()
        except OSError as error:
            raise SourceError(f"{file} cannot be read: {error.strerror}") from error
        values = (os.path.realpath(file), facts.st_size, facts.st_mtime_ns, facts.st_mode)
        digest.update(repr(values).encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What is known of earlier runs, so that results are not taken for sources."""

    results: Path
    """Where masks go: left out where a folder above it is walked."""

    outputs: frozenset[str]
    """Real paths of masks made so far."""

    owners: Mapping[str, str]
    """Path of the source that each id stands for."""


def find_sources(asked: Sequence[str | Path], made: Made) -> list[Candidate]:
    """Everything that is asked for; what cannot be a case is refused in a row of its own.

    Args:
        asked: Files, folders (walked; hidden ones and run directories passed over), globs, and
            ``.csv`` lists with the columns ``id`` and ``path`` (and ``series``, if wanted), paths
            relative to the list.
        made: What is no source.

    Raises:
        PlanError: a list that cannot be read, a glob below a folder that is not there, or a URL.
    """
    found: dict[str, list[Candidate]] = {}
    seen: set[tuple[str, str | None]] = set()
    for candidate, listed in _all(asked, made):
        real = (os.path.realpath(candidate.path), candidate.series)
        if real[0] in made.outputs or (real in seen and not listed):
            continue
        seen.add(real)
        found.setdefault(candidate.id, []).append(candidate)
    return [one for id_, several in found.items() for one in _told_apart(id_, several, made)]


def _told_apart(id_: str, several: list[Candidate], made: Made) -> list[Candidate]:
    """One source for an id: the one that had it before, else the first; the others are refused."""
    owner = next((c for c in several if str(c.path) == made.owners.get(id_)), several[0])
    reason = f"the id is taken by {owner.path}: give ids of your own in a CSV list"
    return [c if c is owner or c.refused else replace(c, refused=reason) for c in several]


def _all(asked: Sequence[str | Path], made: Made) -> Iterator[tuple[Candidate, bool]]:
    for source in asked:
        text, path = str(source), Path(source).absolute()
        if "://" in text:
            raise PlanError(f"{text}: only local files are read; copy it to this machine")
        if path.is_dir():
            found = _walk(path, made)
        elif text.lower().endswith(".csv"):
            yield from ((one, True) for one in _listed(path))
            continue
        elif os.path.lexists(path) or not glob.has_magic(text):
            found = iter([_file(path, [path.name])])
        else:
            found = _matched(path, made)
        yield from ((one, False) for one in found)


def _matched(pattern: Path, made: Made) -> Iterator[Candidate]:
    parts = pattern.parts
    fixed = Path(*parts[: next(n for n, part in enumerate(parts) if glob.has_magic(part))])
    if not fixed.is_dir():
        raise PlanError(f"{pattern}: there is no folder {fixed}")
    for hit in sorted(glob.glob(str(pattern), recursive=True)):
        path = Path(hit)
        if _below(made.results, fixed) and _within(path, made.results):
            continue
        if path.is_dir():
            yield from _walk(path, made)
        elif is_known(path.name):
            yield _file(path, [path.name])


def _walk(top: Path, made: Made) -> Iterator[Candidate]:
    leave_out = os.path.realpath(made.results) if _below(made.results, top) else None
    troubles: list[OSError] = []
    visited = {os.path.realpath(top)}
    for here, folders, names in os.walk(top, onerror=troubles.append, followlinks=True):
        folder = Path(here)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in list(folders):  # a link may lead back here
            real = os.path.realpath(folder / name)
            if real in visited or real == leave_out or _is_run(folder / name):
                folders.remove(name)
            visited.add(real)
        parts = list(folder.relative_to(top).parts)
        for name in sorted(names):
            if is_known(name) and not name.startswith("."):
                yield _file(folder / name, [*parts, name])
        yield from _series(folder, parts or [top.name])
    for error in troubles:
        path = Path(os.fsdecode(error.filename or top))
        reason = f"{path} cannot be read: {error.strerror}"
        yield Candidate(id=_id([path.name]), path=path, refused=reason)


def _file(path: Path, parts: Sequence[str]) -> Candidate:
    """A file by its name; what is no file (a pipe, a device) would be waited for for ever."""
    refused = f"{path} is no file" if path.exists() and not path.is_file() else ""
    return Candidate(id=_id([*parts[:-1], stem(parts[-1])]), path=path, refused=refused)


def _series(folder: Path, parts: list[str]) -> Iterator[Candidate]:
    from adapters.dicom_folder import find_series, is_dicom_folder

    try:
        series = find_series(folder) if is_dicom_folder(folder) else ()
    except (SourceError, OSError) as error:
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
            table = csv.DictReader(file, skipinitialspace=True)
            rows, columns = [(table.line_num, row) for row in table], table.fieldnames or ["none"]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PlanError(f"the list {path} cannot be read: {error}") from error
    for number, row in rows:
        case, source = (row.get("id") or "").strip(), (row.get("path") or "").strip()
        if row.keys() >= {"id", "path"} and not (case or source):
            continue  # a spreadsheet's empty row
        if not case or not source:
            raise PlanError(
                f"the list {path}, line {number}: needs the columns id and path, filled;"
                f" found the columns {', '.join(columns)}"
            )
        place = Path(os.path.normpath(path.parent / source))
        series = (row.get("series") or "").strip() or None
        try:
            yield Candidate(id=check_case_id(case), path=place, series=series)
        except PlanError as error:
            yield Candidate(id=case, path=place, refused=str(error))


def _id(parts: Sequence[str]) -> str:
    """Names of folders and file as one id; what cannot stand in it becomes an underscore.

    Letters that are lost, and what is cut, leave a hash behind, so that ids stay apart.

    >>> _id(["patient 7", "ct"])
    'patient_7__ct'
    >>> _id(["北京"])
    '68c77e15'
    """
    text = SEPARATOR.join(parts)
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip("._-")
    plain = re.sub(r"\.{2,}", ".", plain)
    if text.isascii() and 0 < len(plain) <= 128:
        return plain
    mark = hashlib.sha256(os.fsencode(text)).hexdigest()[:8]
    return f"{plain[:119]}_{mark}".lstrip("_")


def _is_run(folder: Path) -> bool:
    """Whether it is the run directory of a segmentation, or a Zarr store."""
    return os.path.exists(folder / "lease.lock") or os.path.exists(folder / "zarr.json")


def _below(folder: Path, top: Path) -> bool:
    """Whether ``folder`` lies in ``top``, and is not ``top`` itself."""
    return _within(folder, top) and os.path.realpath(folder) != os.path.realpath(top)


def _within(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
