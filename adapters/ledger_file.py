"""The ledgers on storage that processes share: tiles of an image, and cases of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from adapters.json_lines import JsonLines
from pipeline.domain import CaseRecord, TileKey
from pipeline.ports import Record

_FIELDS = tuple(each.name for each in fields(Record))


class LedgerFile:
    """Records of tiles; a later line replaces an earlier one."""

    def __init__(self, directory: Path, *, owner: str) -> None:
        self._lines = JsonLines(directory, owner=owner)

    def records(self) -> dict[TileKey, Record]:
        """The latest record of every tile. Raises StoreError for a line that cannot be one."""
        return {record.key: record for record in self.history()}

    def history(self) -> Iterator[Record]:
        """Every line of every segment, oldest first. Raises StoreError."""
        return self._lines.read(_record)

    def append(self, record: Record) -> None:
        """Add one line. Raises StoreError when it cannot be written whole."""
        # Not asdict, whose deep copies take longer than the rest: quick tiles come by the thousand.
        values = {name: getattr(record, name) for name in _FIELDS}
        self._lines.append(values, what=f"tile {record.key.number}")

    def close(self) -> None:
        """Close the segment of this process."""
        self._lines.close()


class CaseLedgerFile:
    """What became of each case of a batch; a later line replaces an earlier one."""

    def __init__(self, directory: Path, *, owner: str) -> None:
        self._lines = JsonLines(directory, owner=owner)

    def records(self) -> dict[str, CaseRecord]:
        """The latest record of every case. Raises StoreError for a line that cannot be one."""
        return {record.case: record for record in self.history()}

    def history(self) -> Iterator[CaseRecord]:
        """Every line of every segment, oldest first. Raises StoreError."""
        return self._lines.read(_case_record)

    def append(self, record: CaseRecord) -> None:
        """Add one line. Raises StoreError when it cannot be written whole."""
        self._lines.append(asdict(record), what=f"case {record.case}")

    def close(self) -> None:
        """Close the segment of this process."""
        self._lines.close()


def _record(values: Mapping[str, Any]) -> Record:
    counts = {int(value): int(count) for value, count in values["counts"].items()}
    areas = {int(value): float(area) for value, area in values["areas"].items()}
    key = TileKey(*values["key"])
    return Record(**{**values, "key": key, "counts": counts, "areas": areas})


def _case_record(values: Mapping[str, Any]) -> CaseRecord:
    return CaseRecord(**{**values, "classes": tuple(values["classes"])})
