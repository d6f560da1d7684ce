"""Polygons over the pixels of a raster: which pixels lie inside, without a mask of the scene.

A pixel is inside where its centre is (GDAL's rule). Axes in array names: S = YX.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import shapely
from affine import Affine
from numpy.typing import NDArray
from rasterio.features import rasterize

from pipeline.domain import Halo, Region, Shape

BLOCK = 512
"""Side, in pixels, of what is rasterised at once: blocks anchored at the scene's (0, 0), so that a
centre within roundings of an edge falls on the same side whichever region asks."""

_POLYGON = 3
_AROUND = Halo.uniform(1, ndim=2)
"""Polygons are cut this far outside of a block: what lies beyond does not show in it."""


@dataclass(frozen=True, eq=False)
class PolygonArea:
    """The inside of polygons. Picklable; what is built from them is built where it is used."""

    polygons: tuple[bytes, ...]
    """WKB of valid polygons and multipolygons, x columns and y rows from the scene's (0, 0)."""

    shape: Shape
    """The scene, in pixels."""

    digest: str
    """Identity of the file that they come from."""

    def __reduce__(self) -> tuple[type[PolygonArea], tuple[Any, ...]]:
        return (PolygonArea, (self.polygons, self.shape, self.digest))

    @property
    def bounds(self) -> Region:
        """The smallest box of pixels that holds all of them; cut at the scene."""
        if not self.polygons:
            return Region((0, 0), (0, 0))
        left, top, right, bottom = shapely.total_bounds(self._tree.geometries)
        start = int(np.floor(top)), int(np.floor(left))
        return Region(start, (int(np.ceil(bottom)), int(np.ceil(right)))).clip(self.shape)

    def inside(self, region: Region) -> NDArray[np.bool_]:
        """(*S) bool, new: the pixels of ``region`` whose centres lie in a polygon."""
        inside_S = np.zeros(region.shape, bool)
        for block in _blocks(region):
            part = block & region
            inside_S[part.slices(within=region)] = self._block(block)[part.slices(within=block)]
        return inside_S

    def touches(self, region: Region) -> bool:
        """Whether any pixel of ``region`` lies inside."""
        if not self._near(region).size:
            return False
        near = region & self.bounds
        return any(
            self._block(block)[(block & near).slices(within=block)].any() for block in _blocks(near)
        )

    @cached_property
    def _tree(self) -> shapely.STRtree:
        polygons = shapely.from_wkb(self.polygons)
        shapely.prepare(polygons)
        return shapely.STRtree(polygons)

    def _near(self, region: Region) -> NDArray[np.intp]:
        """Numbers of the polygons that meet a box of pixels."""
        near: NDArray[np.intp] = self._tree.query(_box(region), predicate="intersects")
        return near

    def _block(self, block: Region) -> NDArray[np.bool_]:
        """(*S) bool of one block, all of it, past the scene's border as well."""
        near = self._tree.geometries[self._near(block)]
        if not near.size:
            return np.zeros(block.shape, bool)
        if shapely.covers(near, _box(block)).any():
            return np.ones(block.shape, bool)
        parts = shapely.get_parts(shapely.clip_by_rect(near, *_box(block.grow(_AROUND)).bounds))
        parts = parts[(shapely.get_type_id(parts) == _POLYGON) & ~shapely.is_empty(parts)]
        if not parts.size:
            return np.zeros(block.shape, bool)
        top, left = block.start
        inside_S = rasterize(
            parts, out_shape=block.shape, transform=Affine.translation(left, top), dtype="uint8"
        )
        return np.asarray(inside_S, bool)


def _blocks(region: Region) -> Iterable[Region]:
    """The blocks that a region meets, whole; none where it is empty."""
    return region.align(BLOCK).blocks((BLOCK, BLOCK)) if region.size else ()


def _box(region: Region) -> Any:
    """A box of pixels, as a polygon."""
    (top, left), (bottom, right) = region.start, region.stop
    return shapely.box(left, top, right, bottom)
