"""Stitching without blending: a tile keeps its core, and the argmax is taken there."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.domain import Region, Tile
from pipeline.ports import Area, Block

_AT_ONCE = 2**20
"""Scores that the argmax is taken of at once."""


def keep_core(array: NDArray[Any], *, core: Region, within: Region) -> NDArray[Any]:
    """The last axes of ``array``, which holds ``within``, cut to ``core``; a view.

    Leading axes (channels, classes) are kept whole. Raises RegionError when ``core`` is not inside.
    """
    index: tuple[Any, ...] = (..., *core.slices(within=within))
    cut: NDArray[Any] = array[index]
    return cut


def wanted(tile: Tile, block: Block, *, area: Area | None) -> NDArray[np.bool_]:
    """(*S) bool, of the core: the valid pixels of ``block``, which is what was read, in the area.

    A view, or new. Raises SourceReadError.
    """
    valid_S: NDArray[np.bool_] = keep_core(block.valid_S, core=tile.core, within=tile.read)
    if area is None or not valid_S.any():
        return valid_S
    return valid_S & area.inside(tile.core)


def to_labels(
    score_KS: NDArray[Any], *, valid_S: NDArray[np.bool_], values: NDArray[Any], nodata: int
) -> NDArray[Any]:
    """Class ids (*S) of the best score; ties go to the lowest class, invalid pixels to nodata.

    ``values`` (K,) holds the id of each channel in the mask's dtype; a new array of that dtype.
    """
    labels_S: NDArray[Any] = np.empty(score_KS.shape[1:], values.dtype)
    # Some rows at a time: numpy copies what it takes the argmax of, and gives 8 bytes a pixel.
    height = max(1, _AT_ONCE * len(labels_S) // max(1, score_KS.size))
    for row in range(0, len(labels_S), height):
        rows = slice(row, row + height)
        labels_S[rows] = values[np.argmax(score_KS[:, rows], axis=0)]
    labels_S[~valid_S] = nodata
    return labels_S
