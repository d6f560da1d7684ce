"""Where the mean of a scene comes from: sums that a pass has stored, or a tile that is the scene.

Axes in array names: C channel, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.domain import Grid, Region, Shape, Tile
from pipeline.errors import StoreError
from pipeline.models.scene_mean import (
    GivenMean,
    OwnMean,
    block_grid,
    mean_of,
    total_of,
    valid_features,
)
from pipeline.ports import ArrayStore, Block

MISSING = -1.0
"""Value of a store of sums where nothing was written: the number of features is never that."""


class SceneContext(Protocol):
    """How image pooling gets the mean of the scene."""

    def pooling(self, tile: Tile, block: Block) -> GivenMean | OwnMean:
        """What stands for image pooling in this tile, of which ``block`` was read."""


class SceneSums:
    """Sums over the blocks of a scene, in a store; a process reads their mean once. Picklable."""

    def __init__(self, store: ArrayStore, grid: Grid) -> None:
        """``store`` is (C + 1, *blocks) float64 as ``sums_layout`` says, for tiles of ``grid``."""
        self._store, self._grid, self._blocks = store, grid, block_grid(grid)

    @property
    def block(self) -> Shape:
        """Side of a block per axis, in features."""
        return tuple(side // self._grid.stride for side in self._blocks.tile)

    def zeros(self, core: Region) -> NDArray[np.float64]:
        """The sums of a tile's core in which no feature counts. Raises StoreError."""
        return np.zeros_like(self.read(core))

    def write(self, region: Region, array: NDArray[Any]) -> str:
        """Store the sums of a tile's core; the SHA-256 of their bytes. Raises StoreError."""
        return self._store.write(self._places(region), array)

    def read(self, region: Region) -> NDArray[Any]:
        """The sums (C + 1, *blocks) of a tile's core. Raises StoreError."""
        return self._store.read(self._places(region))

    def pooling(self, tile: Tile, block: Block) -> GivenMean:
        """The scene's mean. Raises StoreError while sums are missing."""
        return GivenMean(mean_of(self.total))

    @cached_property
    def total(self) -> NDArray[np.float64]:
        """(C + 1,) sum over the features of the scene that count, and how many do.

        Raises StoreError while sums are missing.
        """
        return total_of(self._slabs())

    def _slabs(self) -> Iterator[NDArray[np.float64]]:
        """All sums, one row of tiles after another: a scene's may be larger than a tile."""
        whole = Region.whole(self._blocks.counts)
        height = max(1, self._grid.tile[0] // self._blocks.tile[0])
        for slab in whole.blocks((height, *whole.shape[1:])):
            sums_CS = self._store.read(slab)
            if (sums_CS[-1] == MISSING).any():
                raise StoreError("the mean of the scene is not known: sums of tiles are missing")
            yield sums_CS

    def _places(self, core: Region) -> Region:
        """The blocks of a tile's core."""
        sides = self._blocks.tile
        return Region(
            tuple(a // side for a, side in zip(core.start, sides, strict=True)),
            tuple(-(-b // side) for b, side in zip(core.stop, sides, strict=True)),
        )


def sums_layout(grid: Grid, channels: int) -> tuple[Shape, Shape]:
    """Shape and chunks of a store of sums: a chunk a tile, ``channels`` and their number first."""
    blocks = block_grid(grid)
    pairs = zip(grid.tile, blocks.tile, strict=True)
    return (channels + 1, *blocks.counts), (channels + 1, *(-(-a // b) for a, b in pairs))


class SceneInOneTile:
    """A scene that is one tile: its features are all there, and no other pass is needed."""

    def __init__(self, grid: Grid) -> None:
        self._stride, self._block = grid.stride, block_grid(grid).tile

    def pooling(self, tile: Tile, block: Block) -> OwnMean:
        """The mean over the tile's own features that count."""
        return OwnMean(
            valid_S=core_features(tile, block, stride=self._stride),
            block=tuple(side // self._stride for side in self._block),
        )


def core_features(tile: Tile, block: Block, *, stride: int) -> NDArray[np.bool_]:
    """Which features of a tile's core count."""
    return valid_features(block.valid_S[tile.core.slices(within=tile.read)], stride=stride)
