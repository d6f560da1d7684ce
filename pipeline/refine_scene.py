"""STORY 5, tiles under one lattice: gather it from all of them -> each as in story 4.

There is no halo. Tiles are read once for each pass over them, by the process that holds the
lattice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from pipeline.crf.whole_scene import SceneCrf, SceneTile
from pipeline.domain import Pass, Tile
from pipeline.ports import Record
from pipeline.refine_tile import Given, Refined, RefineTiles


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SceneLattice:
    """The lattice, which stands where a network would; it never leaves its process."""

    key: str
    """The plan's fingerprint."""

    crf: SceneCrf

    def load(self) -> SceneCrf:
        """The lattice that was gathered."""
        return self.crf


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RefineScene:
    """The tiles of a scene, after all of them were gathered."""

    tiles: RefineTiles
    model: SceneLattice

    @property
    def key(self) -> str:
        """The plan's fingerprint."""
        return self.tiles.key

    def gather(self, sweep: Pass) -> Iterator[int]:
        """Visit all tiles in each pass; yield the pass's number, from 1, after each visit.

        Raises SourceReadError or CrfError: without one tile there is no lattice for the others.
        """

        def load(number: int) -> SceneTile:
            tile = sweep.tile(number)
            return _placed(tile, self.read(tile))

        return self.model.crf.gather(range(len(sweep)), load=load)

    def read(self, tile: Tile) -> Given:
        """As a tile with a halo is read."""
        return self.tiles.read(tile)

    def compute(self, model: SceneCrf, tile: Tile, data: Given) -> Refined:
        """What the lattice says of the tile; nothing where no pixel is valid."""
        valid_S = data.block.valid_S
        if not valid_S.any():
            return Refined(valid_S=valid_S, prob_KS=None)
        return Refined(valid_S=valid_S, prob_KS=model.finish(_placed(tile, data)))

    def refine(self, tile: Tile, data: Refined) -> NDArray[Any]:
        """Labels (*S) of the tile."""
        return self.tiles.refine(tile, data)

    def write(self, tile: Tile, result: NDArray[Any]) -> Record:
        """As a tile with a halo is written."""
        return self.tiles.write(tile, result)


def _placed(tile: Tile, data: Given) -> SceneTile:
    assert tile.read == tile.core
    return SceneTile(prob_KS=data.prob_KS, block=data.block, origin=tile.core.start)
