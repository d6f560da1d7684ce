"""Small arrays of a run, each a file that is named by its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.array_file import write_whole
from pipeline.domain import Region
from pipeline.errors import StoreError


class PieceFiles:
    """A folder of ``.npy`` files; a half-written one has no final name. Picklable."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()  # a worker has another working directory

    def write(self, region: Region, array: NDArray[Any]) -> None:
        """Keep the array of a region, in place of one that is there. Raises StoreError."""
        write_whole(self._file(region), lambda sink: np.save(sink, array, allow_pickle=False))

    def read(self, region: Region) -> NDArray[Any] | None:
        """What was kept of exactly this region; None where nothing was. Raises StoreError."""
        try:
            array: NDArray[Any] = np.load(self._file(region), allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(f"{self._file(region)} could not be read: {error}") from error
        if array.shape[-region.ndim :] != region.shape:
            raise StoreError(f"{self._file(region)} is damaged: it holds {array.shape}")
        return array

    def _file(self, region: Region) -> Path:
        sides = (f"{a}-{b}" for a, b in zip(region.start, region.stop, strict=True))
        return self._path / f"{'_'.join(sides)}.npy"
