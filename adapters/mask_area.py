"""The nonzero voxels of a volume as an area. Axes in array names: C channel, S = ZYX."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.domain import Region
from pipeline.ports import Source

_AT_ONCE = 2**24
"""Voxels that are looked at together."""


@dataclass(frozen=True, eq=False)
class MaskArea:
    """Where a mask is not zero. Picklable, as its source is."""

    source: Source
    """The mask, of one channel, on the grid of the image."""

    digest: str
    """Of the mask's content."""

    @property
    def bounds(self) -> Region:
        """All of the volume: nothing is read to know better."""
        return Region.whole(self.source.info.shape)

    def inside(self, region: Region) -> NDArray[np.bool_]:
        """(*S) bool, new: the voxels of ``region`` that are not zero, NaN taken for zero.

        Raises SourceReadError.
        """
        block = self.source.read(region)
        return np.asarray((block.image_CS[0] != 0) & block.valid_S)

    def touches(self, region: Region) -> bool:
        """Whether any voxel of ``region`` is not zero. Raises SourceReadError."""
        plane = max(1, region.size // max(1, region.shape[0]))
        slab = (max(1, _AT_ONCE // plane), *region.shape[1:])
        return any(self.inside(part).any() for part in region.blocks(slab))
