"""STORY 5, a tile under one lattice, a round: read, hear the neighbours -> mean field -> tell them.

In the last round, as in story 4: keep core -> write. There is no halo.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray

from pipeline.crf.placed_tile import CaseTiles, PlacedTile, Room
from pipeline.crf.whole_scene import Heard, SceneCrf, ScenePixels, Told
from pipeline.domain import Pass, Tile
from pipeline.ports import Record, RowStore
from pipeline.refine_tile import Given, Refined, RefineTiles


def rounds_of(sweep: Pass, crf: SceneCrf) -> tuple[Pass, ...]:
    """The passes of the lattice, of which each needs the one before, and ``sweep`` as the last.

    A tile that fails before or in the first is nodata for the others. Later it has told them
    something, which they would then have heard in part.
    """
    names = [*(f"lattice-{turn}" for turn in range(crf.rounds - 1)), sweep.name]
    return tuple(
        replace(sweep, name=name, after=after, bears_gaps=turn < 2)
        for turn, (name, after) in enumerate(zip(names, [sweep.after, *names], strict=False))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneModel:
    """The picklable recipe of what stands where a network would: threads, and room for tiles."""

    threads: int
    """Of a worker; the result does not depend on them."""

    @property
    def key(self) -> str:
        """All that decides what is loaded."""
        return f"scene crf {self.threads}"

    def load(self) -> Room:
        """Start the threads. Raises ImportError where the native engine was not built."""
        return Room(threads=self.threads)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attentive:
    """What is known of a tile, and what it heard; nothing in the first round."""

    here: Given | PlacedTile
    """As it was read, or as this process kept it."""

    heard: Heard | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineScene:
    """The picklable recipe of all rounds: a process has one of it, and so finds what it kept."""

    tiles: RefineTiles
    crf: SceneCrf
    rows: RowStore

    turns: tuple[str, ...]
    """Names of the passes; the last one writes the mask."""

    room_bytes: int
    """The most that a process may keep of placed tiles between rounds."""

    kept: CaseTiles = field(default_factory=CaseTiles, compare=False, repr=False)

    @property
    def key(self) -> str:
        """The plan's fingerprint, marked as the lattice's."""
        return f"{self.tiles.key} lattice"

    @property
    def model(self) -> SceneModel:
        """With the threads of the tiles."""
        return SceneModel(threads=self.tiles.model.threads)

    def read(self, tile: Tile) -> Attentive:
        """The tile as it was kept, else image and probabilities; and what others told it."""
        assert tile.read == tile.core
        number, placed = tile.key.number, self.kept.find(tile.key.number)
        met = placed is not None and placed.met
        heard = self.crf.hear(self.rows, self._turn(tile), number, met=met)
        return Attentive(here=placed or self.tiles.read(tile), heard=heard)

    def compute(self, model: Room, tile: Tile, data: Attentive) -> Told | Refined:
        """What the tile tells, or what became of it."""
        number, placed, heard = tile.key.number, data.here, data.heard
        if isinstance(placed, Given):
            pixels = ScenePixels(number=number, prob_KS=placed.prob_KS, block=placed.block)
            placed = self.crf.place(pixels, model)
        else:
            model.let_go(placed)
            self.kept.forget(number)  # what fails half-way is not fit to be found again
        if heard is None or not self._last(tile):
            told = self.crf.tell(placed, heard)
            if model.keep(placed, most_bytes=self.room_bytes):
                self.kept.note(number, placed)
            return told
        prob_KS = None if placed.native is None else self.crf.finish(placed, heard)
        return Refined(valid_S=placed.valid_S, prob_KS=prob_KS)

    def refine(self, tile: Tile, data: Told | Refined) -> Told | NDArray[Any]:
        """Labels (*S) in the last round."""
        return self.tiles.refine(tile, data) if isinstance(data, Refined) else data

    def write(self, tile: Tile, result: Told | NDArray[Any]) -> Record:
        """As in story 4, or what the neighbours are told."""
        if not isinstance(result, Told):
            return self.tiles.write(tile, result)
        self.tiles.guard.check()
        number = tile.key.number
        digest = self.rows.write(self._turn(tile), number, result.rows)
        return Record(
            key=tile.key,
            status="done",
            digest=digest,
            sent_bytes=result.sent_bytes,
            vertices=result.vertices,
            kept=number in self.kept,
        )

    def _turn(self, tile: Tile) -> int:
        return self.turns.index(tile.key.stage)

    def _last(self, tile: Tile) -> bool:
        return tile.key.stage == self.turns[-1]
