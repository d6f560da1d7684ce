"""The ledger as append-only JSON lines: one segment per driver, the union of all on read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.domain import TileKey
from pipeline.errors import StoreError
from pipeline.ports import Record


class LedgerFile:
    """Records of tiles in ``directory/NNNNNN-owner.jsonl``; a later line replaces an earlier one.

    A torn last line, left by a killed process, is passed over: its tile counts as not done.
    """

    def __init__(self, directory: Path, *, owner: str) -> None:
        self._directory = directory
        self._owner = owner
        self._segment: int | None = None

    def records(self) -> dict[TileKey, Record]:
        """The latest record of every tile. Raises StoreError for a line that cannot be one."""
        return {record.key: record for record in self.history()}

    def history(self) -> Iterator[Record]:
        """Every line of every segment, oldest first. Raises StoreError."""
        for segment in sorted(self._directory.glob("*.jsonl")):
            yield from _read(segment)

    def append(self, record: Record) -> None:
        """Add one line. Raises StoreError when it cannot be written whole."""
        line = json.dumps(asdict(record), separators=(",", ":"), sort_keys=True) + "\n"
        try:
            if self._segment is None:
                self._segment = self._open_segment()
            data = line.encode()
            if os.write(self._segment, data) != len(data):
                raise OSError("the line was cut short")
        except OSError as error:
            raise StoreError(
                f"ledger {self._directory}: tile {record.key.number} could not be noted: {error};"
                " free the disk and run the same command again"
            ) from error

    def close(self) -> None:
        """Close the segment of this process."""
        if self._segment is not None:
            os.close(self._segment)
            self._segment = None

    def _open_segment(self) -> int:
        self._directory.mkdir(parents=True, exist_ok=True)
        number = len(list(self._directory.glob("*.jsonl")))
        path = self._directory / f"{number:06d}-{self._owner}.jsonl"
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_WRONLY, 0o644)


def _read(segment: Path) -> Iterator[Record]:
    lines = segment.read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            yield _record(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) - 1:
                return
            raise StoreError(
                f"ledger {segment}: line {number + 1} is damaged ({error}); start over with --fresh"
            ) from error


def _record(values: Mapping[str, Any]) -> Record:
    counts = {int(value): int(count) for value, count in values["counts"].items()}
    return Record(**{**values, "key": TileKey(*values["key"]), "counts": counts})
