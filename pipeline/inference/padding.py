"""Reading past a scene's bottom and right border: the scene goes on as its own mirror image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.domain import Region
from pipeline.errors import RegionError
from pipeline.ports import Block, Source


def read_padded(source: Source, region: Region) -> Block:
    """Read ``region``, which may reach past the bottom and right border of the scene.

    What lies beyond is the scene reflected there, without repeating the edge, as often as needed
    (numpy's ``reflect``); a side of one pixel repeats it. Only the part that is needed is read.

    Returns:
        Image (C, *S) in the source's dtype and valid mask (*S), S the region's shape.

    Raises:
        RegionError: the region starts before the scene's (0, 0).
        SourceReadError: from the source.
    """
    shape = source.info.shape
    if region.ndim != len(shape) or min(region.start) < 0:
        raise RegionError(f"a region at {region.start} asked of a scene of {shape} px at 0")
    if region in Region.whole(shape):
        return source.read(region)
    indices = [
        reflected(np.arange(a, b), length)
        for a, b, length in zip(region.start, region.stop, shape, strict=True)
    ]
    needed = Region(
        tuple(int(index.min()) for index in indices),
        tuple(int(index.max()) + 1 for index in indices),
    )
    block = source.read(needed)
    pick = np.ix_(*(index - a for index, a in zip(indices, needed.start, strict=True)))
    image_CS = np.stack([band_S[pick] for band_S in block.image_CS])
    return Block(image_CS, block.valid_S[pick])


def reflected(position: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """The pixel of an axis of ``length`` px that stands at each ``position``, both from 0.

    >>> reflected(np.arange(8), 3).tolist()
    [0, 1, 2, 1, 0, 1, 2, 1]
    """
    period = max(2 * (length - 1), 1)
    folded = position % period
    return np.minimum(folded, period - folded) if length > 1 else np.zeros_like(position)
