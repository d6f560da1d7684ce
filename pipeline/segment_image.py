"""STORY 2, images: plan -> what the ledger lacks -> story 1 over those tiles -> ready to finish.

One image or many, the pool is one. No format, no Ray, no tracker here: they are behind the ports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

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
        # Whoever kept something in an earlier run is gone.
        done = {
            key: replace(r, kept=False) for key, r in found if key in wanted and r.status == "done"
        }
        self._left = Counter({sweep.name: len(sweep) for sweep in plan.passes})
        self._left.subtract(key.stage for key in done)
        self._given_up: set[TileKey] = set()
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
                work = self._works[sweep.name]
                yield [Job(work=work, tile=t, home=self._home(sweep, t)) for t in wanted]

    def _home(self, sweep: Sweep, tile: Tile) -> str:
        """The worker that kept what it made of the tile in the pass before; empty for none."""
        before = self.outcome.records.get(tile.key._replace(stage=sweep.needs))
        return before.worker if before is not None and before.kept else ""

    def note(self, record: Record) -> None:
        """Into the ledger first, before anyone hears of it. Raises StoreError.

        Once a pass has ended with failed tiles, so have those that cannot do without them.
        """
        self._note(record)
        stage = record.key.stage
        if self._left[stage]:
            return
        lost = [r for r in self.outcome.failed if r.key.stage == stage]
        lost = [r for r in lost if r.key not in self._given_up]
        if lost:
            self._give_up(stage, {r.key.number: r for r in lost})

    def _give_up(self, stage: str, causes: Mapping[int, Record]) -> None:
        """Fail what needs tiles of ``stage`` that failed, in all passes that build on it.

        All tiles of a pass that does not bear gaps, else those of the same numbers.
        """
        first = next(iter(causes.values()))
        all_of: dict[str, bool] = {}
        for sweep in self._plan.passes:
            if sweep.needs == stage:
                all_of[sweep.name] = not sweep.bears_gaps
            elif sweep.needs in all_of:
                all_of[sweep.name] = all_of[sweep.needs]
            else:
                continue
            for tile in sweep.tiles():
                cause = causes.get(tile.key.number, first if all_of[sweep.name] else None)
                if cause is None or tile.key in self.outcome.records:
                    continue
                why = f"{stage} pass: tile {cause.key.number} failed: {cause.error}"
                self._given_up.add(tile.key)
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
