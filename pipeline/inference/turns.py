"""In which order a tile's stages run, and how many rows of each map are held: arithmetic only.

Each stage runs band by band of whole rows (or planes), and no band before the stages after it ask
for it; rows that nobody will read again make room for the next. So of a map little more is held
than its readers reach over, however tall the tile is. The image is such a map, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from pipeline.inference.row_sums import lead
from pipeline.inference.stage_plan import Needs, block_of, needed_span
from pipeline.models.chain import Chain, Stage, Step


class Turn(NamedTuple):
    """One band of a map, computed at once or in windows side by side."""

    name: str
    """Of the map: the image's, or its stage's."""

    first: int
    """First row of the band; of an eager stage, of the band of what it reads."""

    stop: int
    """First row after it."""

    keep: int
    """First row of the map that somebody has still to read."""


@dataclass(frozen=True, slots=True)
class Turns:
    """All that a tile computes, in order."""

    order: tuple[Turn, ...]

    heights: Mapping[str, int]
    """Rows for which each map has room: those held at most, or those held on average and half as
    many as are kept from turn to turn, so that these are moved to the front once in a while only.
    """

    lives: Mapping[str, tuple[int, int]]
    """Numbers of the turns from which and to which each map is held, the last one included."""

    @classmethod
    def of(cls, chain: Chain, needs: Needs, *, window: int) -> Turns:
        """The turns of a tile; ``window`` as ``block_of`` takes it."""
        progress = _Progress(chain, needs, window)
        progress.advance(chain.logits, needs.regions[chain.logits].stop[0])
        heights = {
            name: min(needs.regions[name].shape[0], _room(progress.held[name], progress.kept[name]))
            for name in progress.bands
        }
        lives: dict[str, tuple[int, int]] = {}
        for number, turn in enumerate(progress.order):
            lives.setdefault(turn.name, (number, number))
            for reader in progress.bands[turn.name].readers:
                lives[reader.source] = lives[reader.source][0], number
            lives[turn.name] = lives[turn.name][0], number
        return cls(tuple(progress.order), heights, lives)


def _room(held: list[int], kept: list[int]) -> int:
    """Rows of a map; at the scene's edge, where windows of means are shifted, more are held."""
    return max(max(held), math.ceil((sum(held) + sum(kept) / 2) / len(held)))


@dataclass(slots=True)
class _Reader:
    """A step that reads a map: which rows of it the next turn of its stage needs."""

    step: Step
    source: str
    first: int
    stop: int


@dataclass(slots=True)
class _Band:
    """How far a map is: rows before ``made`` of what is computed are done, to ``stop`` next."""

    name: str
    made: int
    stop: int
    end: int
    height: int
    readers: list[_Reader]
    """Of the stage's inputs; the image has none."""

    source: str = ""
    """The map after whose bands it runs, if it is of an eager stage."""


@dataclass(slots=True)
class _Progress:
    chain: Chain
    needs: Needs
    window: int
    order: list[Turn] = field(default_factory=list)
    held: dict[str, list[int]] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)
    """Rows of a map, after each of its turns, and those of them that were there before it."""

    bands: dict[str, _Band] = field(default_factory=dict)
    users: dict[str, list[_Reader]] = field(default_factory=dict)
    followers: dict[str, list[Stage]] = field(default_factory=dict)
    """The eager stages that run after a map's bands."""

    def __post_init__(self) -> None:
        self.users.update({name: [] for name in self.chain.channels})
        heights, ends = self._heights(), self._ends()
        stages = {stage.name: stage for stage in self.chain.stages}
        for name in self.users:
            stage = stages.get(name)
            region = self.needs.computed(stage) if stage else self.needs.regions[name]
            reads = stage.reads() if stage else ()
            readers = [_Reader(step, read, 0, 0) for step, read in reads]
            for reader in readers:
                self.users[reader.source].append(reader)
            start, height = region.start[0], heights[name]
            # Canonical windows stand where the scene's do.
            first = height if self.needs.sides else (ends[name] - start - 1) % height + 1
            stop = min(start + first, region.stop[0])
            band = _Band(name, start, stop, region.stop[0], height, readers)
            self.bands[name], self.held[name], self.kept[name] = band, [], []
            if stage and stage.eager:
                band.source, band.stop = readers[0].source, start
                self.followers.setdefault(band.source, []).append(stage)
                for reader in readers:  # it has nothing to wait for
                    reader.first = self.needs.regions[band.source].stop[0]
            else:
                self._look(band)

    def _heights(self) -> dict[str, int]:
        """Rows of each map's bands: as many pixels of all, so that no stage waits for another.

        Those of the stage whose windows are the highest, or of several, one below the other.
        """
        shapes, end = self.needs.shapes, self.chain.endpoint
        image = max(1, shapes[self.chain.image][0] - end)
        row_px = {name: Fraction(image, max(1, shapes[name][0] - end)) for name in self.users}
        whole = [stage for stage in self.chain.stages if stage.whole]
        if self.needs.sides is not None:
            window_px = Fraction(self.needs.sides[self.chain.image][0])
        else:
            parts = (stage for stage in self.chain.stages if not stage.whole)
            windows = (block_of(s, self.needs, self.window)[0] * row_px[s.name] for s in parts)
            window_px = max(windows, default=Fraction(1))
        # Turns take time to count: bands thinner than so many pixels are taken together.
        band_px = window_px * max(1, int(self.window / window_px))
        heights = {name: max(1, int(band_px / row_px[name])) for name in self.users}
        return heights | {s.name: self.needs.computed(s).shape[0] for s in whole}

    def _ends(self) -> dict[str, int]:
        """A row of each map before which a band ends: what the band of its readers' needs.

        So of a map no row is held for a band of a reader that needs some more of the next.
        """
        region = self.needs.regions[self.chain.logits]
        ends = {self.chain.logits: (region.start[0] + region.stop[0] + 1) // 2}
        for stage in reversed(self.chain.stages):
            last = ends[stage.name]
            for step, name in stage.reads():
                shape = self.needs.shapes[name]
                _, stop = needed_span(step, 0, last - 1, last, shape, self.needs.frame)
                ends[name] = max(ends.get(name, 0), stop)
        return ends

    def advance(self, name: str, stop: int) -> None:
        """Have the rows before ``stop`` of a map computed, and before them what they need."""
        band = self.bands[name]
        while band.made < min(stop, band.end):
            if band.source:
                self.advance(band.source, self.bands[band.source].made + 1)
                continue
            for reader in band.readers:
                if self.bands[reader.source].made < reader.stop:
                    self.advance(reader.source, reader.stop)
            self._take(band)

    def _take(self, band: _Band) -> None:
        """The band's turn, after that of all that it reads."""
        name, stop = band.name, band.stop
        needed = self.needs.regions[name]
        made = max(band.made, needed.start[0])
        readers = self.users[name]
        # Nobody reads the logits: they are kept.
        keep = min([made, *(reader.first for reader in readers)]) if readers else needed.start[0]
        self.held[name].append(min(stop, needed.stop[0]) - keep)
        self.kept[name].append(made - keep)
        self.order.append(Turn(name, band.made, stop, keep))
        first, band.made, band.stop = band.made, stop, min(stop + band.height, band.end)
        self._look(band)
        for stage in self.followers.get(name, ()):
            self._follow(stage, first, stop)

    def _follow(self, stage: Stage, first: int, stop: int) -> None:
        """The turn of an eager stage, after rows ``[first, stop)`` of what it reads."""
        name, band = stage.name, self.bands[stage.name]
        leads = [lead(step) for step, _ in stage.reads()]
        keep = min([band.made, *(reader.first for reader in self.users[name])])
        self.kept[name].append(band.stop - keep)
        # Its last rows lack what lies beyond the map.
        whole = stop == self.bands[band.source].end
        band.made = band.end if whole else max(band.made, min(stop + min(leads), band.end))
        band.stop = max(band.stop, min(stop + max(leads), band.end))
        self.held[name].append(band.stop - keep)
        self.order.append(Turn(name, first, stop, keep))

    def _look(self, band: _Band) -> None:
        """What the band's next turn reads."""
        for reader in band.readers:
            held = self.needs.regions[reader.source]
            if band.made == band.stop:  # there is none
                reader.first = reader.stop = held.stop[0]
                continue
            shape = self.needs.shapes[reader.source]
            a, b = needed_span(reader.step, 0, band.made, band.stop, shape, self.needs.frame)
            reader.first, reader.stop = max(a, held.start[0]), min(b, held.stop[0])
