"""STORY 2, images: plan -> what the ledger lacks -> story 1 over those tiles -> ready to finish.

One image or many, the pool is one. No format, no Ray, no tracker here: they are behind the ports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pipeline.domain import Pass, Sweep, Tile, TileKey, TilePlan, Walk
from pipeline.ports import Backend, Feed, Job, Ledger, Record, Work

Observer = Callable[[Record], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far the tiles of an image are."""

    records: dict[TileKey, Record] = field(default_factory=dict)
    """The latest record of every tile of the plan that has one."""

    total: int = 0

    def of(self, sweep: Sweep) -> Outcome:
        """How far the tiles of one pass are."""
        records = {key: r for key, r in self.records.items() if key.stage == sweep.name}
        return Outcome(records, len(sweep))

    def without(self, sweep: Sweep) -> Outcome:
        """How far the tiles of all other passes are."""
        records = {key: r for key, r in self.records.items() if key.stage != sweep.name}
        return Outcome(records, self.total - len(sweep))

    @property
    def failed(self) -> list[Record]:
        """Tiles that were given up."""
        return [record for record in self.records.values() if record.status == "failed"]

    @property
    def interrupted(self) -> bool:
        """True while tiles are untouched: the run goes on, or was told to stop."""
        return len(self.records) < self.total


class ImageTiles:
    """The tiles of one image: those that its ledger lacks, and what becomes of them.

    Tiles that failed in an earlier run are tried again.
    """

    def __init__(
        self,
        plan: TilePlan,
        works: Mapping[str, Work],
        *,
        ledger: Ledger,
        observers: Iterable[Observer],
    ) -> None:
        """Take what is to be done in each pass, by the pass's name.

        Raises StoreError for a ledger that cannot be read.
        """
        self._plan, self._works, self._ledger = plan, works, ledger
        self.observers = list(observers)
        wanted = {tile.key for tile in plan.tiles()}
        found = ledger.records().items()
        done = {key: r for key, r in found if key in wanted and r.status == "done"}
        self._left = Counter({sweep.name: len(sweep) for sweep in plan.passes})
        self._left.subtract(key.stage for key in done)
        self.outcome = Outcome(done, len(plan))

    def jobs(self) -> Iterator[list[Job] | None]:
        """What is to be done: stretches of neighbours, each best done by one worker.

        None while a pass waits for the one before.
        """
        for sweep in self._plan.passes:
            while self._left[sweep.needs]:
                yield None
            for tiles in _stretches(sweep):
                wanted = (tile for tile in tiles if tile.key not in self.outcome.records)
                yield [Job(work=self._works[sweep.name], tile=tile) for tile in wanted]

    def note(self, record: Record) -> None:
        """Into the ledger first, before anyone hears of it. Raises StoreError.

        Once a pass has ended with failed tiles, those of passes that need it fail as well.
        """
        self._note(record)
        stage = record.key.stage
        if self._left[stage]:
            return
        lost = [r for r in self.outcome.failed if r.key.stage == stage]
        if lost:
            self._give_up({stage}, lost[0])

    def _give_up(self, stages: set[str], cause: Record) -> None:
        """Fail the tiles of all passes that need one of ``stages``, or one that does."""
        why = f"{cause.key.stage} pass: tile {cause.key.number} failed: {cause.error}"
        for sweep in self._plan.passes:
            if sweep.needs not in stages:
                continue
            stages.add(sweep.name)
            for tile in sweep.tiles():
                if tile.key not in self.outcome.records:
                    self._note(Record(key=tile.key, status="failed", error=why))

    def _note(self, record: Record) -> None:
        self._ledger.append(record)
        self._left[record.key.stage] -= record.key not in self.outcome.records
        self.outcome.records[record.key] = record
        for observe in self.observers:
            observe(record)


def _stretches(sweep: Sweep) -> Iterator[list[Tile]]:
    """Tiles side by side together; samples lie apart."""
    return Walk(sweep).stretches() if isinstance(sweep, Pass) else ([t] for t in sweep.tiles())


def segment_images(
    feed: Feed,
    images: Mapping[str, ImageTiles],
    *,
    backend: Backend,
    ended: Callable[[str], None],
    stop: Callable[[], bool],
) -> None:
    """Run every job of ``feed``; say ``ended(case)`` once an image has no tile left.

    Args:
        feed: Jobs of the images; more may come while it runs.
        images: By the case in their tiles' keys; may grow while it runs, before the feed does.
        backend: Who runs the tiles.
        ended: Told from this thread.
        stop: True drains what is in flight and returns.

    Raises what the backend, the ledger and ``ended`` raise.
    """
    for record in backend.run(feed, stop=stop):
        image = images[record.key.case]
        image.note(record)
        if not image.outcome.interrupted:
            ended(record.key.case)
