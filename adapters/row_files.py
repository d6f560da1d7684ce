"""What tiles tell one another: a file a tile and round, of which each neighbour reads its part."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.array_file import write_whole
from pipeline.errors import StoreError


class RowFiles:
    """A folder a round, of ``.npz`` files that are not compressed. Picklable.

    A half-written file has no final name; what is read is checked against its sum.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()  # a worker has another working directory

    def write(self, turn: int, number: int, rows: Mapping[str, NDArray[Any]]) -> str:
        """Keep the rows in place of those that are there; their SHA-256. Raises StoreError."""
        write_whole(
            self._file(turn, number), lambda sink: np.savez(sink, allow_pickle=False, **rows)
        )
        digest = hashlib.sha256()
        for array in rows.values():
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def read(self, turn: int, number: int, names: Sequence[str]) -> list[NDArray[Any]]:
        """Some of what a tile told in a round. Raises StoreError."""
        file = self._file(turn, number)
        try:
            with np.load(file, allow_pickle=False) as rows:
                return [rows[name] for name in names]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise StoreError(
                f"{file} could not be read: {error}; start over with --fresh"
            ) from error

    def has(self, turn: int, number: int) -> bool:
        """Whether the tile told anything in that round."""
        return self._file(turn, number).is_file()

    def forget(self, turn: int) -> None:
        """Delete what was told in a round."""
        shutil.rmtree(self._path / str(turn), ignore_errors=True)

    def _file(self, turn: int, number: int) -> Path:
        return self._path / str(turn) / f"{number}.npz"
