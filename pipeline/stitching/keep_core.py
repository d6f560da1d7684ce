"""Stitching without blending: a tile keeps its core, and the argmax is taken there."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.domain import Region


def keep_core(array: NDArray[Any], *, core: Region, within: Region) -> NDArray[Any]:
    """The last axes of ``array``, which holds ``within``, cut to ``core``; a view.

    Leading axes (channels, classes) are kept whole. Raises RegionError when ``core`` is not inside.
    """
    index: tuple[Any, ...] = (..., *core.slices(within=within))
    cut: NDArray[Any] = array[index]
    return cut


def to_labels(
    score_KS: NDArray[Any], *, valid_S: NDArray[np.bool_], values: NDArray[Any], nodata: int
) -> NDArray[Any]:
    """Class ids (*S) of the best score; ties go to the lowest class, invalid pixels to nodata.

    ``values`` (K,) holds the id of each channel in the mask's dtype; a new array of that dtype.
    """
    labels_S: NDArray[Any] = values[np.argmax(score_KS, axis=0)]
    labels_S[~valid_S] = nodata
    return labels_S
