"""How far a run is: a bar for people, a line now and then for logs, a file for ``status``."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipeline.ports import Record
from workflows.run_dir import write_json

LINE_EVERY_S = 10.0
FILE_EVERY_S = 1.0


class RunProgress:
    """An observer of records; a context manager around the run."""

    def __init__(
        self, *, total: int, known: Iterable[Record], file: Path, console: Console
    ) -> None:
        done = list(known)
        self._file, self._console, self._total = file, console, total
        self._done, self._failed, self._new = len(done), 0, 0
        self._start = self._line_at = self._file_at = time.monotonic()
        self._bar = Progress(
            TextColumn("segment"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=self._done, rate="")

    def __enter__(self) -> RunProgress:
        self._bar.start()
        self._write("running")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        if kind is None:
            finished = self._done + self._failed == self._total
            self._write("finished" if finished else "interrupted")

    def __call__(self, record: Record) -> None:
        """Note one more tile."""
        self._new += 1
        if record.status == "done":
            self._done += 1
        else:
            self._failed += 1
            self._console.print(f"tile {record.key.number} failed: {record.error}")
        now = time.monotonic()
        self._bar.update(
            self._task, completed=self._done + self._failed, rate=f"{self._rate(now):.2f} tiles/s"
        )
        if now - self._file_at >= FILE_EVERY_S:
            self._file_at = now
            self._write("running")
        if not self._console.is_terminal and now - self._line_at >= LINE_EVERY_S:
            self._line_at = now
            self._console.print(self._line(now))

    def _rate(self, now: float) -> float:
        return self._new / max(now - self._start, 1e-9)

    def _left_s(self, now: float) -> float:
        rate = self._rate(now)
        left = self._total - self._done - self._failed
        return left / rate if rate > 0 else math.inf

    def _line(self, now: float) -> str:
        return (
            f"{self._done} of {self._total} tiles, {self._failed} failed,"
            f" {self._rate(now):.2f} tiles/s, {self._left_s(now):.0f} s left"
        )

    def _write(self, state: str) -> None:
        now = time.monotonic()
        left = self._left_s(now)
        write_json(
            self._file,
            {
                "state": state,
                "tiles_done": self._done,
                "tiles_failed": self._failed,
                "tiles_total": self._total,
                "tiles_per_s": round(self._rate(now), 4),
                "seconds": round(now - self._start, 3),
                "seconds_left": None if math.isinf(left) else round(left, 1),
            },
        )
