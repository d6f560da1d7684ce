"""Do two files lie on the same pixels?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adapters.nifti_header import Orientation
from pipeline.domain import ImageInfo
from pipeline.errors import SourceError

GRID_SLACK = 0.01
"""How far, in pixels, the corners of the other may lie from those of the image."""

_IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def check_same_grid(image: ImageInfo, other: ImageInfo, *, names: str) -> tuple[str, ...]:
    """Notes. Raises SourceError where the other does not lie on the image's own pixels.

    Args:
        image: what is segmented.
        other: scores, labels or an area for it.
        names: of both files, in that order, for the message.
    """
    if image.shape != other.shape:
        raise SourceError(
            f"{names} differ in shape, {image.shape} and {other.shape}: give files on one grid"
        )
    if other.affine == _IDENTITY != image.affine and other.crs is None:
        return ("the scores have no georeferencing: taken pixel for pixel",)
    if None not in (image.crs, other.crs) and image.crs != other.crs:
        raise SourceError(f"{names} differ in CRS: give files on one grid")
    apart = np.abs(_corners(other) - _corners(image)).max() / _shortest_side(image)
    if apart > GRID_SLACK:
        raise SourceError(f"{names} lie {apart:.3g} px apart at a corner: give files on one grid")
    return ()


def _matrix(info: ImageInfo) -> NDArray[np.float64]:
    """Rows of the affine: from the file's pixel indices, and a last 1, to places."""
    return np.array(info.affine).reshape(-1, info.ndim + 1)[: info.ndim]


def _corners(info: ImageInfo) -> NDArray[np.float64]:
    """Places (axis, corner) of the image's corners, in the order in which it is read."""
    ends = np.meshgrid(*((-0.5, n - 0.5) for n in info.shape), indexing="ij")
    matrix = _matrix(info)
    stored = _stored(np.reshape(ends, (info.ndim, -1)), info)
    places: NDArray[np.float64] = matrix[:, :-1] @ stored
    return places + matrix[:, -1:]


def _stored(read: NDArray[np.float64], info: ImageInfo) -> NDArray[np.float64]:
    """The affine's indices (axis, place) of places given as they are read: (y, x) or (z, y, x).

    A volume is read in canonical order, whatever the order in its file.
    """
    if info.ndim == 2:
        return read[::-1]
    order, stored = Orientation.from_affine(np.reshape(info.affine, (4, 4))), np.empty_like(read)
    for axis, flip, length, along in zip(order.axes, order.flips, info.shape, read, strict=True):
        stored[axis] = length - 1 - along if flip else along
    return stored


def _shortest_side(info: ImageInfo) -> float:
    """Of a pixel, in the unit of the affine."""
    return float(np.linalg.norm(_matrix(info)[:, :-1], axis=0).min())
