"""How far a run is: a bar for people, a line now and then for logs, a file for ``status``."""

from __future__ import annotations

import logging
import math
import time
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

from pipeline.errors import StoreError
from workflows.run_dir import write_json

log = logging.getLogger(__name__)

LINE_EVERY_S = 10.0
FILE_EVERY_S = 1.0


def stderr_console() -> Console:
    """Where people are told: logs and progress go to stderr."""
    return Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


class RunProgress:
    """Counts what is done; a context manager around the run."""

    def __init__(self, unit: str, *, total: int, done: int, file: Path, console: Console) -> None:
        """``unit``: what is counted, in the plural: tiles or cases."""
        self._unit, self._file, self._console = unit, file, console
        self._total, self._done, self._failed, self._new = total, done, 0, 0
        self._start = self._line_at = self._file_at = time.monotonic()
        self._bar = Progress(
            TextColumn(unit),
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

    def add(self, *, complaint: str = "") -> None:
        """One more is done; or has failed, for the reason that ``complaint`` gives."""
        self._new += 1
        if complaint:
            self._failed += 1
            self._console.print(complaint)
        else:
            self._done += 1
        now = time.monotonic()
        rate = f"{self._rate(now):.2f} {self._unit}/s"
        self._bar.update(self._task, completed=self._done + self._failed, rate=rate)
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
            f"{self._done} of {self._total} {self._unit}, {self._failed} failed,"
            f" {self._rate(now):.2f} {self._unit}/s, {self._left_s(now):.0f} s left"
        )

    def _write(self, state: str) -> None:
        try:
            self._write_file(state)
        except StoreError as error:  # a look at the run, not a part of it
            log.warning("%s", error)

    def _write_file(self, state: str) -> None:
        now = time.monotonic()
        left = self._left_s(now)
        write_json(
            self._file,
            {
                "state": state,
                f"{self._unit}_done": self._done,
                f"{self._unit}_failed": self._failed,
                f"{self._unit}_total": self._total,
                f"{self._unit}_per_s": round(self._rate(now), 4),
                "seconds": round(now - self._start, 3),
                "seconds_left": None if math.isinf(left) else round(left, 1),
            },
        )
