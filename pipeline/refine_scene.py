"""STORY 5, a tile under one lattice, a round: read, hear the neighbours -> mean field -> tell them.

In the last round, as in story 4: keep core -> write. There is no halo.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from pipeline.crf.engine import Engine
from pipeline.crf.whole_scene import Heard, SceneCrf, ScenePixels, Told
from pipeline.domain import Pass, Tile
from pipeline.ports import Record, RowStore
from pipeline.refine_tile import CrfModel, Given, Refined, RefineTiles


def rounds_of(sweep: Pass, crf: SceneCrf) -> tuple[Pass, ...]:
    """The passes of the lattice, of which each needs the one before, and ``sweep`` as the last."""
    passes: list[Pass] = []
    for turn in range(crf.rounds - 1):
        after = passes[-1].name if passes else sweep.after
        passes.append(replace(sweep, name=f"lattice-{turn}", after=after))
    return (*passes, replace(sweep, after=passes[-1].name))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attentive:
    """What a tile was given, and what it heard; nothing in the first round."""

    given: Given
    heard: Heard | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineScene:
    """The picklable recipe of one round."""

    tiles: RefineTiles
    crf: SceneCrf
    rows: RowStore

    turn: int
    """Of the round, from 0."""

    @property
    def key(self) -> str:
        """The plan's fingerprint, marked as the round's."""
        return f"{self.tiles.key} lattice {self.turn}"

    @property
    def model(self) -> CrfModel:
        """That of the tiles."""
        return self.tiles.model

    @property
    def last(self) -> bool:
        """Whether the mask is written in this round."""
        return self.turn == self.crf.rounds - 1

    def read(self, tile: Tile) -> Attentive:
        """Image, probabilities, and what was told in the rounds before."""
        assert tile.read == tile.core
        heard = self.crf.hear(self.rows, self.turn, tile.key.number)
        return Attentive(given=self.tiles.read(tile), heard=heard)

    def compute(self, model: Engine, tile: Tile, data: Attentive) -> Told | Refined:
        """What the tile tells, or what became of it; ``model`` shows that the engine is here."""
        block, heard = data.given.block, data.heard
        found = ScenePixels(number=tile.key.number, prob_KS=data.given.prob_KS, block=block)
        if heard is None or not self.last:
            return self.crf.tell(found, heard)
        some = bool(block.valid_S.any())
        prob_KS = self.crf.finish(found, heard) if some else None
        return Refined(valid_S=block.valid_S, prob_KS=prob_KS)

    def refine(self, tile: Tile, data: Told | Refined) -> Told | NDArray[Any]:
        """Labels (*S) in the last round."""
        return self.tiles.refine(tile, data) if isinstance(data, Refined) else data

    def write(self, tile: Tile, result: Told | NDArray[Any]) -> Record:
        """As in story 4, or what the neighbours are told."""
        if not isinstance(result, Told):
            return self.tiles.write(tile, result)
        self.tiles.guard.check()
        digest = self.rows.write(self.turn, tile.key.number, result.rows)
        return Record(
            key=tile.key,
            status="done",
            digest=digest,
            sent_bytes=result.sent_bytes,
            vertices=result.vertices,
        )
