"""In which order a tile's stages run, and how many rows of each map are held: arithmetic only.

Each stage runs band by band of whole rows (or planes), and no band before the stages after it ask
for it; rows that nobody will read again make room for the next. So of a map little more is held
than its readers reach over, however tall the tile is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.domain import Region
from pipeline.inference.stage_plan import Needs, block_of, needed_span
from pipeline.models.chain import Chain, Stage, Step


@dataclass(frozen=True, slots=True)
class Turn:
    """One band of a stage's output, computed at once or in windows side by side."""

    stage: Stage
    region: Region

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
        rows = {
            stage.name: min(
                needs.regions[stage.name].shape[0],
                progress.held[stage.name] + progress.kept[stage.name] // 2,
            )
            for stage in chain.stages
        }
        lives: dict[str, tuple[int, int]] = {}
        for number, turn in enumerate(progress.order):
            name = turn.stage.name
            lives.setdefault(name, (number, number))
            for _, read in turn.stage.reads():
                if read != chain.image:
                    lives[read] = lives[read][0], number
        return cls(tuple(progress.order), rows, lives)


@dataclass(slots=True)
class _Reader:
    """A step that reads a map, and the first row that it has still to read."""

    step: Step
    source: str
    next: int


@dataclass(slots=True)
class _Band:
    """How far a stage is: rows before ``made`` of what it computes are done."""

    stage: Stage
    region: Region
    height: int
    made: int
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
    bands: dict[str, _Band] = field(init=False)
    users: dict[str, list[_Reader]] = field(init=False)

    def __post_init__(self) -> None:
        self.bands, self.users = {}, {stage.name: [] for stage in self.chain.stages}
        for stage in self.chain.stages:
            region = self.needs.computed(stage)
            height = block_of(stage, self.needs, window=self.window)[0]
            readers = [
                _Reader(step, name, self.needs.regions[name].start[0])
                for step, name in stage.reads()
                if name != self.chain.image
            ]
            for reader in readers:
                self.users[reader.source].append(reader)
            self.bands[stage.name] = _Band(stage, region, height, region.start[0], readers)
            self.held[stage.name] = self.kept[stage.name] = 0
            self._seek(self.bands[stage.name])

    def advance(self, name: str, stop: int) -> None:
        """Have the rows before ``stop`` of a map computed, and before them what they need."""
        band = self.bands[name]
        while band.made < min(stop, self.needs.regions[name].stop[0]):
            end = min(band.made + band.height, band.region.stop[0])
            for reader in band.readers:
                self.advance(reader.source, self._span(reader, band.made, end)[1])
            self._take(band, end)

    def _take(self, band: _Band, end: int) -> None:
        """The band's turn, after that of all that it reads."""
        name = band.stage.name
        needed = self.needs.regions[name]
        made, stop = max(band.made, needed.start[0]), min(end, needed.stop[0])
        keep = min([made, *(user.next for user in self.users[name])])
        if not self.users[name]:  # the logits
            keep = needed.start[0]
        self.held[name] = max(self.held[name], stop - keep)
        self.kept[name] = max(self.kept[name], made - keep)
        region = band.region
        part = Region((band.made, *region.start[1:]), (end, *region.stop[1:]))
        self.order.append(Turn(band.stage, part, keep))
        band.made = end
        self._seek(band)

    def _seek(self, band: _Band) -> None:
        """Where the band's next turn starts to read."""
        for reader in band.readers:
            if band.made == band.region.stop[0]:
                reader.next = self.needs.regions[reader.source].stop[0]
            else:
                end = min(band.made + band.height, band.region.stop[0])
                first = self._span(reader, band.made, end)[0]
                reader.next = max(first, self.needs.regions[reader.source].start[0])

    def _span(self, reader: _Reader, first: int, stop: int) -> tuple[int, int]:
        shape = self.needs.shapes[reader.source]
        return needed_span(reader.step, 0, first, stop, shape, self.needs.frame)
