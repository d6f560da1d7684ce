"""What people see of a batch: progress, the table of cases, and the tracker's run."""

from __future__ import annotations

import csv
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.domain import CaseRecord
from pipeline.errors import StoreError
from pipeline.models.bundle import Bundle
from pipeline.ports import Record
from workflows.batch_case import Layout
from workflows.config import SegmentOptions
from workflows.progress import RunProgress, stderr_console
from workflows.publish import METRICS_EVERY_S, open_tracker
from workflows.run_dir import RunDir, write_json

COLUMNS = ("id", "status", "reason", "source", "output", "seconds", "computed", "tiles", "model")
SIZES = ("area_m2", "volume_ml", "pixels")


class BatchPapers:
    """Told of every case that is settled, from any thread."""

    def __init__(
        self, layout: Layout, options: SegmentOptions, *, models: Mapping[int, Bundle], total: int
    ) -> None:
        run = RunDir(layout.run_dir)
        self._layout, self._options, self._models, self._total = layout, options, models, total
        self._tracking = run.tracking
        self._tracker = open_tracker(options, output=layout.tables, known=run.tracking)
        self._rows: list[dict[str, Any]] = []
        self._counts: Counter[str] = Counter()
        self._tiles = 0
        self._lock, self._opening, self._opened = threading.Lock(), threading.Lock(), False
        self._start = self._logged = time.monotonic()
        self.progress = RunProgress(
            "cases", total=total, done=0, file=run.progress, console=stderr_console()
        )

    def tracking_run(self) -> str | None:
        """The tracker's run, opened when the first case is computed; None where there is none."""
        with self._opening:
            if not self._opened:
                self._opened = True
                self._open()
        return self._tracker.run_id

    def _open(self) -> None:
        params = {f"options.{k}": str(v) for k, v in self._options.request().items()}
        params["sources"] = str(self._total)
        tags = {
            f"model.{dims}d": f"{bundle.name} {bundle.version} {bundle.digest}"
            for dims, bundle in self._models.items()
        }
        self._tracker.start(params=params, tags=tags | {"terravox.batch": str(self._layout.tables)})
        if self._tracker.run_id:
            write_json(self._tracking, {"run_id": self._tracker.run_id})

    def tile_done(self, record: Record) -> None:
        """Figures over time."""
        self._tiles += record.status == "done"
        now = time.monotonic()
        if now - self._logged >= METRICS_EVERY_S:
            self._logged = now
            self._log()

    def settled(self, record: CaseRecord, *, computed: bool) -> None:
        """One more case has its final state."""
        bad = record.state != "done"
        with self._lock:
            self._rows.append(_row(record, computed=computed))
            self._counts[record.state] += 1
            self._counts["computed"] += computed
            said = f"{record.case} {record.state}: {record.reason}" if bad else ""
            self.progress.add(complaint=said)

    def finish(self, todo: Iterable[CaseRecord]) -> dict[str, Any]:
        """Write the tables, close the tracker's run; returns what ``cases.json`` holds.

        Args:
            todo: What was not up to date; those that are not settled are rows, too.
        """
        # By source as well: one that was refused has the id of the one that took it.
        settled = {(row["id"], row["source"]) for row in self._rows}
        waiting = [record for record in todo if (record.case, record.uri) not in settled]
        rows = self._rows + [_row(record, computed=False) for record in waiting]
        counts, bad = self._counts, self._counts["failed"] + self._counts["quarantined"]
        status = "interrupted" if waiting else "partial" if bad else "done"
        values = _values(self._layout, status, counts) | {
            "seconds": round(time.monotonic() - self._start, 3),
            "mlflow_run_id": self._tracker.run_id,
            "cases": sorted(rows, key=lambda row: str(row["id"])),
        }
        values["counts"]["total"] = self._total
        tables = (self._layout.tables / "cases.json", self._layout.tables / "cases.csv")
        write_json(tables[0], values)
        _write_csv(tables[1], values["cases"])
        self._log()
        self._tracker.finish(status, artifacts=tables)
        if status != "interrupted":
            self._tracking.unlink(missing_ok=True)  # the next batch is another run
        return values

    def fail(self) -> None:
        """Close the tracker's run as failed; the same command goes on in it."""
        self._tracker.finish("failed", artifacts=())

    def _log(self) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        settled = sum(self._counts[state] for state in ("done", "failed", "quarantined"))
        self._tracker.metrics(
            {
                "cases_done": float(self._counts["done"]),
                "cases_failed": float(self._counts["failed"] + self._counts["quarantined"]),
                "cases_per_min": 60 * self._counts["computed"] / seconds,
                "tiles_per_s": self._tiles / seconds,
            },
            step=settled,
        )


def nothing(layout: Layout) -> dict[str, Any]:
    """The answer where no source was found; tables of earlier runs stay."""
    return _values(layout, "done", Counter()) | {"seconds": 0.0, "mlflow_run_id": None, "cases": []}


def _values(layout: Layout, status: str, counts: Counter[str]) -> dict[str, Any]:
    names = ("total", "done", "failed", "quarantined", "computed")
    return {
        "status": status,
        "output": str(layout.tables),
        "run_dir": str(layout.run_dir),
        "counts": {name: counts[name] for name in names},
    }


def _row(record: CaseRecord, *, computed: bool) -> dict[str, Any]:
    return {
        "id": record.case,
        "status": record.state,
        "reason": record.reason,
        "source": record.uri,
        "output": record.output if record.state == "done" else None,
        "seconds": record.seconds,
        "computed": computed,
        "tiles": record.tiles,
        "model": record.model,
        "classes": list(record.classes),
    }


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A column for each class: its area in m2, volume in ml, or else its pixels."""
    flat = [{name: row[name] for name in COLUMNS} | _sizes(row["classes"]) for row in rows]
    names = dict.fromkeys((*COLUMNS, *(name for row in flat for name in row)))
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with draft.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            table = csv.DictWriter(file, list(names), restval="")
            table.writeheader()
            table.writerows(flat)
        draft.replace(path)
    except OSError as error:
        raise StoreError(
            f"{path} could not be written: {error}; free the disk and run the same command again"
        ) from error


def _sizes(classes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sizes = {}
    for row in classes:
        unit = next((name for name in SIZES if name in row), None)
        if unit:
            sizes[f"{row['name']} {unit}"] = row[unit]
    return sizes
