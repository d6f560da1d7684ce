"""Images and stores that are arrays in this process: for notebooks, tests and small inputs.

Axes in array names: C channel, S space.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipeline.domain import ImageInfo, Region, Shape
from pipeline.errors import RegionError, SourceError, StoreError
from pipeline.ports import Block


class MemorySource:
    """An image that is an array."""

    def __init__(
        self,
        image_CS: NDArray[Any],
        *,
        info: ImageInfo | None = None,
        valid_S: NDArray[np.bool_] | None = None,
    ) -> None:
        """Take an image; the arrays are kept, not copied.

        Args:
            image_CS: (C, *S), S = YX or ZYX, of any real dtype.
            info: Channels and geometry; numbered channels and pixels as units where None.
            valid_S: (*S); where None, all pixels that are finite and not the info's nodata.

        Raises:
            SourceError: the three do not fit one another.
        """
        self._info = info or _plain_info(image_CS)
        described = (len(self._info.channels), *self._info.shape)
        if image_CS.shape != described or str(image_CS.dtype) != self._info.dtype:
            raise SourceError(
                f"the array is {image_CS.shape} {image_CS.dtype}, its description says"
                f" {described} {self._info.dtype}"
            )
        self._image_CS = image_CS
        self._valid_S = _valid(image_CS, self._info) if valid_S is None else valid_S
        if self._valid_S.shape != self._info.shape or self._valid_S.dtype != np.bool_:
            raise SourceError(
                f"the valid mask is {self._valid_S.shape} {self._valid_S.dtype},"
                f" the image needs {self._info.shape} bool"
            )

    @property
    def info(self) -> ImageInfo:
        """Shape, channels and geometry."""
        return self._info

    def unpack(self) -> None:
        """Nothing is packed: any region can be read."""

    def read(self, region: Region) -> Block:
        """Return ``region``: (C, *S) and (*S) bool; copies. Raises RegionError."""
        whole = Region.whole(self._info.shape)
        if region.ndim != whole.ndim or not region.size or region not in whole:
            raise RegionError(f"{region} is not inside an image of {self._info.shape} px")
        index = region.slices(within=whole)
        return Block(
            image_CS=self._image_CS[(slice(None), *index)].copy(),
            valid_S=self._valid_S[index].copy(),
        )

    def digest(self) -> str:
        """SHA-256 of pixels, mask and description."""
        content = hashlib.sha256(repr(self._info).encode())
        content.update(np.ascontiguousarray(self._image_CS).data)
        content.update(np.ascontiguousarray(self._valid_S).data)
        return content.hexdigest()


class MemoryStore:
    """A store that is an array; a pickle of it is a copy, so it serves one process."""

    def __init__(self, shape: Shape, *, dtype: DTypeLike, fill: float) -> None:
        """Take the shape of the scene, after a leading class axis for scores."""
        self.array = np.full(shape, fill, dtype=dtype)

    def write(self, region: Region, array: NDArray[Any]) -> str:
        """Store (*S) or (K, *S) and return the SHA-256 of its bytes. Raises StoreError."""
        target = self._view(region)
        if target.shape != array.shape or target.dtype != array.dtype:
            raise StoreError(
                f"{region} takes {target.shape} {target.dtype}, got {array.shape} {array.dtype}"
            )
        target[...] = array
        return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()

    def read(self, region: Region) -> NDArray[Any]:
        """``region`` (*S) or (K, *S), a copy. Raises StoreError."""
        return self._view(region).copy()

    def _view(self, region: Region) -> NDArray[Any]:
        leading = self.array.ndim - region.ndim
        scene = Region.whole(self.array.shape[max(leading, 0) :])
        if leading not in (0, 1) or region not in scene:
            raise StoreError(f"{region} is not inside a store of {self.array.shape}")
        return self.array[(slice(None),) * leading + region.slices(within=scene)]


class MemoryPieces:
    """Small arrays by the region that each is of; for one process."""

    def __init__(self) -> None:
        self._pieces: dict[Region, NDArray[Any]] = {}

    def write(self, region: Region, array: NDArray[Any]) -> None:
        """Keep a copy."""
        self._pieces[region] = array.copy()

    def read(self, region: Region) -> NDArray[Any] | None:
        """What was kept of exactly this region; None where nothing was."""
        return self._pieces.get(region)


def _plain_info(image_CS: NDArray[Any]) -> ImageInfo:
    channels, *shape = image_CS.shape
    return ImageInfo(
        shape=tuple(shape),
        axes=("z", "y", "x")[-len(shape) :],
        channels=tuple(str(number + 1) for number in range(channels)),
        dtype=str(image_CS.dtype),
        nodata=(None,) * channels,
        spacing=(1.0,) * len(shape),
        unit="px",
    )


def _valid(image_CS: NDArray[Any], info: ImageInfo) -> NDArray[np.bool_]:
    valid_S: NDArray[np.bool_] = np.isfinite(image_CS).all(axis=0)
    for image_S, value in zip(image_CS, info.nodata, strict=True):
        if value is not None:
            valid_S &= image_S != value
    return valid_S
