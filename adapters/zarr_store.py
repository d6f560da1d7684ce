"""The mask or the scores of a run, as a zarr 3 array on a file system that all workers share.

Every write is whole chunks, each an atomic rename, so that a retry or a late twin of a task
leaves the same bytes. Which chunks are done is the ledger's to say.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import DTypeLike, NDArray
from zarr.codecs import ZstdCodec

from pipeline.domain import Region, Shape
from pipeline.errors import StoreError

# What zarr and its codecs raise: full disk, no such array, broken metadata, corrupt chunk.
_FAILURES = (OSError, ValueError, RuntimeError, KeyError, TypeError)


class ZarrStore:
    """A chunked array over the scene, with or without a leading class axis; picklable."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path).absolute()  # a worker has another working directory

    def __reduce__(self) -> tuple[type[ZarrStore], tuple[Path]]:
        return (ZarrStore, (self._path,))

    @classmethod
    def create(
        cls, path: str | Path, *, shape: Shape, chunks: Shape, dtype: DTypeLike, fill: float
    ) -> ZarrStore:
        """Make the array, or take the one that is there when it is the same.

        Args:
            path: A directory; its parent need not exist.
            shape: Scene, after a leading class axis for scores.
            chunks: What one write covers, axis by axis; the class axis is whole.
            dtype: uint8, uint16, float16, or float64 for sums.
            fill: The value where nothing was written.

        Raises:
            StoreError: another array is there, or it cannot be written.
        """
        store = cls(path)
        wanted = (tuple(shape), tuple(chunks), np.dtype(dtype), fill)
        if not (store._path / "zarr.json").exists():
            try:
                zarr.create_array(
                    store._path,
                    shape=shape,
                    chunks=chunks,
                    dtype=np.dtype(dtype),
                    fill_value=fill,
                    compressors=ZstdCodec(level=3, checksum=True),
                )
            except _FAILURES as error:
                raise StoreError(f"{store._path} could not be created: {error}") from error
        array = store._array
        found = (array.shape, array.chunks, array.dtype, array.fill_value)
        if found != wanted:
            raise StoreError(
                f"{store._path} holds another array: asked for shape, chunks, dtype, fill {wanted},"
                f" found {found}; start over with --fresh"
            )
        return store

    @property
    def shape(self) -> Shape:
        """Length per axis, the class axis first where there is one. Raises StoreError."""
        return tuple(self._array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values. Raises StoreError."""
        return np.dtype(self._array.dtype)

    def write(self, region: Region, array: NDArray[Any]) -> str:
        """Store whole chunks.

        Args:
            region: In the scene; each side at a multiple of the chunk, or the stop at its end.
            array: (*S) or (K, *S) of the store's own dtype.

        Returns:
            SHA-256 of the array's bytes in C order.

        Raises:
            StoreError: part of a chunk, another shape or dtype, or the write failed.
        """
        index = self._index(region)
        self._require_whole_chunks(region)
        data = np.ascontiguousarray(array)
        expected = self.shape[: len(self.shape) - region.ndim] + region.shape
        if data.shape != expected or data.dtype != self.dtype:
            raise StoreError(
                f"{self._path}: {region} takes {expected} {self.dtype},"
                f" got {data.shape} {data.dtype}"
            )
        try:
            self._array[index] = data
        except _FAILURES as error:
            raise StoreError(
                f"{self._path}: {region} could not be written: {error};"
                " free the disk and run the same command again"
            ) from error
        return hashlib.sha256(data.data).hexdigest()

    def read(self, region: Region) -> NDArray[Any]:
        """``region`` (*S) or (K, *S), a new array; the fill value where nothing was written.

        Raises:
            StoreError: the region leaves the scene, or a chunk could not be read or decoded.
        """
        index = self._index(region)
        try:
            return np.asarray(self._array[index])
        except _FAILURES as error:
            raise StoreError(f"{self._path}: {region} could not be read: {error}") from error

    def sweep(self) -> int:
        """Delete what killed writers left half-written; call it while nobody writes.

        Returns:
            Number of files deleted.

        Raises:
            StoreError: a file could not be deleted.
        """
        leftovers = list(self._path.rglob("*.partial"))
        try:
            for leftover in leftovers:
                leftover.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self._path} could not be swept: {error}") from error
        return len(leftovers)

    @cached_property
    def _array(self) -> zarr.Array[Any]:
        try:
            # Chunks of fill are written too: presence must not depend on content. The setting is
            # taken when an array is opened, and zarr 3.1 takes it from here alone.
            with zarr.config.set({"array.write_empty_chunks": True}):
                return zarr.open_array(self._path, mode="r+")
        except _FAILURES as error:
            raise StoreError(
                f"{self._path} could not be opened as a zarr array: {error}"
            ) from error

    def _index(self, region: Region) -> tuple[slice, ...]:
        leading = len(self.shape) - region.ndim
        if leading not in (0, 1) or region not in Region.whole(self.shape[leading:]):
            raise StoreError(f"{region} is not inside {self._path}, which is {self.shape}")
        return (slice(None),) * leading + region.slices(within=Region.whole(self.shape[leading:]))

    def _require_whole_chunks(self, region: Region) -> None:
        # A part of a chunk would be read, changed and written, and lose what another writes.
        scene, chunks = self.shape[-region.ndim :], self._array.chunks[-region.ndim :]
        for start, stop, chunk, length in zip(
            region.start, region.stop, chunks, scene, strict=True
        ):
            if start % chunk or (stop % chunk and stop != length) or start == stop:
                raise StoreError(
                    f"{self._path}: {region} does not cover whole chunks of {chunks} px"
                    f" of a scene of {scene} px; write tile cores"
                )
