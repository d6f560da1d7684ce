"""What became of each tick of a workflow: a SQLite file on a local disk."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from pipeline.errors import StoreError

TickStatus = Literal["running", "done", "partial", "failed", "interrupted", "superseded"]

SCHEMA_VERSION = 1
WAIT_S = 30.0
"""How long a change waits for another process's."""

SCHEMA = """
CREATE TABLE ticks (
    workflow TEXT NOT NULL,
    tick TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN
        ('running', 'done', 'partial', 'failed', 'interrupted', 'superseded')),
    started TEXT NOT NULL,
    finished TEXT,
    models TEXT NOT NULL DEFAULT '[]',
    counts TEXT NOT NULL DEFAULT '{}',
    reason TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (workflow, tick)
)
"""

_BEGIN = """
INSERT INTO ticks (workflow, tick, status, started) VALUES (:workflow, :tick, 'running', :now)
ON CONFLICT DO UPDATE SET status = 'running', finished = NULL, reason = ''
WHERE status NOT IN ('done', 'superseded')
"""
_SUPERSEDE = """
WITH latest AS (SELECT max(tick) AS tick FROM ticks WHERE workflow = :workflow AND tick <= :now)
UPDATE ticks
SET status = 'superseded', reason = (SELECT tick FROM latest) || ' goes on with its work'
WHERE workflow = :workflow AND tick < (SELECT tick FROM latest)
AND status NOT IN ('done', 'superseded')
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPin:
    """The model that a name stood for when a tick began."""

    uri: str
    """As the workflow names it."""

    name: str
    version: str

    digest: str
    """Of the bundle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """One row: a scheduled time of a workflow, and what became of it."""

    workflow: str

    tick: str
    """Scheduled time, ISO 8601 in UTC: sorts by time."""

    status: TickStatus

    started: str
    """When it was first begun, ISO 8601 in UTC."""

    finished: str | None
    """When it last ended; None while it runs, or after its process was killed."""

    models: tuple[ModelPin, ...]
    counts: Mapping[str, int]
    """Cases by state."""

    reason: str
    """One line; empty unless partial, failed or superseded."""

    @property
    def settled(self) -> bool:
        """True where nothing is left to do."""
        return self.status in ("done", "superseded")


class TickStore:
    """The ticks of one workflow; each change is one short transaction.

    Every method raises StoreError for a file that is damaged, or is no tick store.
    """

    def __init__(self, path: Path, *, workflow: str) -> None:
        self._path, self._workflow = path, workflow

    def history(self) -> list[Tick]:
        """All ticks, oldest first."""
        with self._change() as database:
            rows = database.execute(
                "SELECT workflow, tick, status, started, finished, models, counts, reason"
                " FROM ticks WHERE workflow = ? ORDER BY tick",
                (self._workflow,),
            ).fetchall()
            return [self._decode(row) for row in rows]

    def get(self, tick: datetime) -> Tick | None:
        """The row of ``tick``; None where it was never begun."""
        return next((row for row in self.history() if row.tick == iso(tick)), None)

    def begin(self, tick: datetime, *, now: datetime) -> Tick:
        """Note that ``tick`` runs, anew or again, and return its row.

        Whatever is not done in older ticks is its work from now on: they are superseded, as it is
        itself where a later one has begun. A settled row stays as it is.
        """
        mine = {"workflow": self._workflow, "tick": iso(tick), "now": iso(now)}
        with self._change() as database:
            self._check_ours(database)
            database.execute(_BEGIN, mine)
            database.execute(_SUPERSEDE, mine)
        begun = self.get(tick)
        assert begun is not None
        return begun

    def pin(self, tick: datetime, models: Sequence[ModelPin]) -> None:
        """Note which models ``tick`` uses, now and when it is gone on with."""
        self._set(tick, {"models": json.dumps([asdict(pin) for pin in models])})

    def finish(
        self,
        tick: datetime,
        status: TickStatus,
        *,
        now: datetime,
        counts: Mapping[str, int] | None = None,
        reason: str = "",
    ) -> None:
        """Note how ``tick`` ended; ``counts`` None keeps those of the time before."""
        values = {"status": status, "finished": iso(now), "reason": reason}
        self._set(tick, values if counts is None else values | {"counts": json.dumps(counts)})

    def _set(self, tick: datetime, values: Mapping[str, str]) -> None:
        columns = ", ".join(f"{column} = ?" for column in values)
        with self._change() as database:
            database.execute(
                f"UPDATE ticks SET {columns} WHERE workflow = ? AND tick = ?",  # noqa: S608  ours
                (*values.values(), self._workflow, iso(tick)),
            )

    def _check_ours(self, database: sqlite3.Connection) -> None:
        other = database.execute(
            "SELECT workflow FROM ticks WHERE workflow != ? LIMIT 1", (self._workflow,)
        ).fetchone()
        if other:
            raise StoreError(
                f"{self._path} is the state of workflow {other[0]}, not of {self._workflow}:"
                " give each workflow a state directory of its own"
            )

    def _decode(self, row: tuple[str, ...]) -> Tick:
        workflow, tick, status, started, finished, models, counts, reason = row
        try:
            return Tick(
                workflow=workflow,
                tick=tick,
                status=status,  # type: ignore[arg-type]  # the table's CHECK
                started=started,
                finished=finished,
                models=tuple(ModelPin(**pin) for pin in json.loads(models)),
                counts=json.loads(counts),
                reason=reason,
            )
        except (ValueError, TypeError) as error:
            raise StoreError(f"{self._path} is damaged: the row of tick {tick}: {error}") from error

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(
                sqlite3.connect(self._path, timeout=WAIT_S, isolation_level=None)
            ) as database:
                database.execute("BEGIN IMMEDIATE")
                self._check_schema(database)
                yield database
                database.execute("COMMIT")  # else closing rolls back
        except (sqlite3.Error, OSError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(
                f"the ticks in {self._path} cannot be read or changed ({error}): free the disk,"
                " or move a damaged file away, and the current tick runs anew"
            ) from error

    def _check_schema(self, database: sqlite3.Connection) -> None:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version == 0 and tables == 0:
            database.execute(SCHEMA)
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION:
            raise StoreError(
                f"{self._path} is no tick store of version {SCHEMA_VERSION} (it says {version}):"
                " use the terravox that wrote it, or another state directory"
            )


def iso(moment: datetime) -> str:
    """``moment``, which is in UTC, as it is stored: seconds and an offset."""
    assert moment.utcoffset() is not None
    assert not moment.utcoffset()
    return moment.isoformat(timespec="seconds")
