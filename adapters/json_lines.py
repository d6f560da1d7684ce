"""Append-only JSON lines: a segment per process, the union of all on read.

Works on storage that many hosts mount, where a database does not.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import StoreError

T = TypeVar("T")


class JsonLines:
    """Objects in ``directory/NNNNNN-owner.jsonl``, oldest first; safe to append from threads.

    A torn last line, left by a killed process, is passed over: it was never promised.
    """

    def __init__(self, directory: Path, *, owner: str) -> None:
        self._directory, self._owner = directory, owner
        self._segment: int | None = None
        self._lock = threading.Lock()

    def read(self, decode: Callable[[Mapping[str, Any]], T]) -> Iterator[T]:
        """Every line of every segment. Raises StoreError for a line that ``decode`` refuses."""
        for segment in sorted(self._directory.glob("*.jsonl")):
            yield from _read(segment, decode)

    def append(self, values: Mapping[str, Any], *, what: str) -> None:
        """Add one line; on return it survives the death of this process.

        Raises StoreError, which names ``what``, when the line cannot be written whole.
        """
        data = (json.dumps(values, separators=(",", ":"), sort_keys=True) + "\n").encode()
        try:
            with self._lock:
                if self._segment is None:
                    self._segment = self._open_segment()
                if os.write(self._segment, data) != len(data):
                    raise OSError(errno.ENOSPC, "the line was cut short")
        except OSError as error:
            self.close()  # what comes after a torn line goes into another segment
            raise StoreError(
                f"ledger {self._directory}: {what} could not be noted: {error};"
                " free the disk and run the same command again"
            ) from error

    def close(self) -> None:
        """Close the segment of this process."""
        with self._lock:
            if self._segment is not None:
                os.close(self._segment)
                self._segment = None

    def _open_segment(self) -> int:
        self._directory.mkdir(parents=True, exist_ok=True)
        number = len(list(self._directory.glob("*.jsonl")))
        path = self._directory / f"{number:06d}-{self._owner}.jsonl"
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_WRONLY, 0o644)


def _read(segment: Path, decode: Callable[[Mapping[str, Any]], T]) -> Iterator[T]:
    lines = segment.read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            yield decode(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) - 1:
                return
            raise StoreError(
                f"ledger {segment}: line {number + 1} is damaged ({error}); start over with --fresh"
            ) from error
