"""STORY 2, one image: plan -> what the ledger lacks -> story 1 over those tiles -> finish.

No format, no Ray, no tracker here: they are behind the ports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pipeline.domain import TileKey, TilePlan
from pipeline.ports import Backend, Ledger, Record, Work

Observer = Callable[[Record], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run over the tiles ended."""

    records: dict[TileKey, Record] = field(default_factory=dict)
    """The latest record of every tile of the plan that has one."""

    total: int = 0

    @property
    def failed(self) -> list[Record]:
        """Tiles that were given up."""
        return [record for record in self.records.values() if record.status == "failed"]

    @property
    def interrupted(self) -> bool:
        """True when tiles were left untouched because the run was told to stop."""
        return len(self.records) < self.total


def segment_image(
    plan: TilePlan,
    work: Work,
    *,
    backend: Backend,
    ledger: Ledger,
    observers: Iterable[Observer],
    stop: Callable[[], bool],
) -> Outcome:
    """Run every tile that the ledger does not call done; note each before anyone hears of it.

    Tiles that failed in an earlier run are tried again. Raises what the backend raises.
    """
    wanted = {tile.key for tile in plan.tiles()}
    known = {key: record for key, record in ledger.records().items() if key in wanted}
    done = {key: record for key, record in known.items() if record.status == "done"}
    todo = (tile for tile in plan.tiles() if tile.key not in done)
    outcome = Outcome(dict(done), len(plan))
    if len(done) < len(plan):
        for record in backend.run(work, todo, stop=stop):
            ledger.append(record)
            outcome.records[record.key] = record
            for observe in observers:
                observe(record)
    return outcome
