"""In which order a tile's stages run, and how many rows of each map are held: arithmetic only.

Each stage runs band by band of whole rows (or planes), and no band before the stages after it ask
for it; rows that nobody will read again make room for the next. So of a map little more is held
than its readers reach over, however tall the tile is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.inference.stage_plan import Needs, block_of, needed_span
from pipeline.models.chain import Chain, Stage, Step

_BAND_PX = 64
"""Bands of windows that are thinner than that are taken together: turns take time to count."""


class Turn(NamedTuple):
    """One band of a stage's output, computed at once or in windows side by side."""

    stage: Stage

    first: int
    """First row of the band."""

    stop: int
    """First row after it."""

    keep: int
    """First row of the stage's map that somebody has still to read."""


@dataclass(frozen=True, slots=True)
class Turns:
    """All that a tile computes, in order."""

    order: tuple[Turn, ...]

    heights: Mapping[str, int]
    """Rows for which each map has room: those held at most, and half as many as are kept from turn
    to turn, so that these are moved to the front once in a while only."""

    lives: Mapping[str, tuple[int, int]]
    """Numbers of the turns from which and to which each map is held, the last one included."""

    @classmethod
    def of(cls, chain: Chain, needs: Needs, *, window: int) -> Turns:
        """The turns of a tile; ``window`` as ``block_of`` takes it."""
        progress = _Progress(chain, needs, window)
        progress.advance(chain.logits, needs.regions[chain.logits].stop[0])
        heights = {
            name: min(needs.regions[name].shape[0], held + progress.kept[name] // 2)
            for name, held in progress.held.items()
        }
        lives: dict[str, tuple[int, int]] = {}
        for number, turn in enumerate(progress.order):
            name = turn.stage.name
            lives.setdefault(name, (number, number))
            for _, read in turn.stage.reads():
                if read != chain.image:
                    lives[read] = lives[read][0], number
        return cls(tuple(progress.order), heights, lives)


@dataclass(slots=True)
class _Reader:
    """A step that reads a map: which rows of it the next turn of its stage needs."""

    step: Step
    source: str
    first: int
    stop: int


@dataclass(slots=True)
class _Band:
    """How far a stage is: rows before ``made`` of what it computes are done."""

    stage: Stage
    made: int
    end: int
    height: int
    readers: list[_Reader]
    """Of the stage's inputs."""


@dataclass(slots=True)
class _Progress:
    chain: Chain
    needs: Needs
    window: int
    order: list[Turn] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    bands: dict[str, _Band] = field(default_factory=dict)
    users: dict[str, list[_Reader]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for stage in self.chain.stages:
            reads = [(step, name) for step, name in stage.reads() if name != self.chain.image]
            readers = [_Reader(step, name, 0, 0) for step, name in reads]
            for reader in readers:
                self.users[reader.source].append(reader)
            region = self.needs.computed(stage)
            band = _Band(stage, region.start[0], region.stop[0], self._height(stage), readers)
            self.bands[stage.name], self.users[stage.name] = band, []
            self.held[stage.name] = self.kept[stage.name] = 0
            self._look(band)

    def _height(self, stage: Stage) -> int:
        """Rows of a band, which are whole windows."""
        image, own = (self.needs.shapes[name][0] for name in (self.chain.image, stage.name))
        height = block_of(stage, self.needs, self.window)[0]
        return height * max(1, _BAND_PX * own // (image * height))

    def advance(self, name: str, stop: int) -> None:
        """Have the rows before ``stop`` of a map computed, and before them what they need."""
        band = self.bands[name]
        while band.made < min(stop, band.end):
            for reader in band.readers:
                if self.bands[reader.source].made < reader.stop:
                    self.advance(reader.source, reader.stop)
            self._take(band)

    def _take(self, band: _Band) -> None:
        """The band's turn, after that of all that it reads."""
        name, stop = band.stage.name, min(band.made + band.height, band.end)
        needed = self.needs.regions[name]
        made = max(band.made, needed.start[0])
        readers = self.users[name]
        # Nobody reads the logits: they are kept.
        keep = min([made, *(reader.first for reader in readers)]) if readers else needed.start[0]
        self.held[name] = max(self.held[name], min(stop, needed.stop[0]) - keep)
        self.kept[name] = max(self.kept[name], made - keep)
        self.order.append(Turn(band.stage, band.made, stop, keep))
        band.made = stop
        self._look(band)

    def _look(self, band: _Band) -> None:
        """What the band's next turn reads."""
        first, stop = band.made, min(band.made + band.height, band.end)
        for reader in band.readers:
            held = self.needs.regions[reader.source]
            if first == stop:  # there is none
                reader.first = reader.stop = held.stop[0]
                continue
            shape = self.needs.shapes[reader.source]
            a, b = needed_span(reader.step, 0, first, stop, shape, self.needs.frame)
            reader.first, reader.stop = max(a, held.start[0]), min(b, held.stop[0])
