"""``schedule run``: workflows at their times, in one process that stays.

Each tick is ``schedule tick`` in a process of its own: a crash or a leak ends with it, its lease is
free the moment it dies, and what a run changes in its process (folder, environment, Ray) stays
there. What was done is in the workflow's state alone, so that this process may die at any time.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger

from pipeline.errors import PlanError
from workflows.interrupt import never
from workflows.schedule import sentence
from workflows.workflow_file import Workflow, read_workflow

log = logging.getLogger(__name__)

POLL_S = 0.2
EXIT_WORDS = {75: "refused, another process works on it", 130: "interrupted"}

COMMAND = (sys.executable, "-P", "-c", "from workflows.cli import main; main()")
"""``terravox``, wherever its script lies; -P, or a ``workflows/`` in this folder would be run."""


class CronTicks(BaseTrigger):  # type: ignore[misc]  # untyped
    """The workflow's own cron line.

    Not APScheduler's ``CronTrigger.from_crontab``, which counts the days of the week from Monday:
    to it, ``0 4 * * 1`` is a Tuesday.
    """

    def __init__(self, workflow: Workflow) -> None:
        self._workflow = workflow

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime:
        """The first scheduled time after the last one, or after ``now``."""
        return self._workflow.next_tick(previous_fire_time or now)


def run(
    workflows: Sequence[str | Path],
    *,
    stop: Callable[[], bool] = never,
    trigger: Callable[[Workflow], BaseTrigger] = CronTicks,
    command: Sequence[str] = COMMAND,
) -> bool:
    """Run the ticks of workflows at their times until ``stop()``.

    At the start, and after a tick that took longer than its period, the last scheduled time is
    made up for: once, however many have passed. Workflows run beside one another.

    Args:
        workflows: workflow files; their times are read once, the rest at each tick.
        stop: True drains the ticks under way, and ends.
        trigger: when a workflow is due.
        command: what ``schedule tick FILE`` is added to.

    Returns:
        Whether a tick was interrupted: it is gone on with at the next start.

    Raises:
        PlanError: a workflow file that cannot be, or two with one name or state.
    """
    jobs = [_Job(Path(path).absolute(), command) for path in workflows]
    for key in ("name", "state"):
        values = [getattr(job.workflow, key) for job in jobs]
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise PlanError(f"two workflows have the {key} {twice[0]}: give each its own")
    # It warns of ticks that are due while one runs: they are made up for.
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    scheduler = BackgroundScheduler(
        timezone=UTC,
        executors={"default": ThreadPoolExecutor(max(1, len(jobs)))},
        job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
    )
    present = datetime.now(UTC)
    for job in jobs:
        scheduler.add_job(job.fire, trigger(job.workflow), next_run_time=present)
    scheduler.start()
    try:
        while not stop():
            time.sleep(POLL_S)
        _end(jobs)
        scheduler.shutdown(wait=True)
    finally:  # after a second signal the ticks are told again, and end at once
        _end(jobs)
    return any(job.interrupted for job in jobs)


def _end(jobs: Sequence[_Job]) -> None:
    for job in jobs:
        job.end()


class _Job:
    """One workflow, and the process of its tick while there is one."""

    def __init__(self, path: Path, command: Sequence[str]) -> None:
        self.workflow, self.interrupted = read_workflow(path), False
        self._line = [*command, "schedule", "tick", str(path), "--json"]
        self._process: subprocess.Popen[str] | None = None
        self._ending = False
        self._lock = threading.Lock()

    def fire(self) -> None:
        """The tick that is due, and the next at once if it has become due meanwhile."""
        done = None
        while (due := self.workflow.last_tick(datetime.now(UTC))) != done and not self._ending:
            self._tick(due)
            done = due

    def end(self) -> None:
        """Tell the tick under way to drain."""
        with self._lock:
            self._ending = True
            if self._process is not None:
                with suppress(ProcessLookupError):
                    self._process.terminate()

    def _tick(self, due: datetime) -> None:
        with self._lock:
            if self._ending:
                return
            # A session of its own: Ctrl-C reaches it once, through us, or it would not drain.
            self._process = subprocess.Popen(
                [*self._line, "--at", due.isoformat()],
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        out, _ = self._process.communicate()
        code = self._process.returncode
        self._process = None
        self.interrupted = code in (130, -signal.SIGTERM)
        log.warning("%s", self._outcome(due, code, out))

    def _outcome(self, due: datetime, code: int, out: str) -> str:
        if out:
            return sentence(json.loads(out.splitlines()[-1]))
        problem = EXIT_WORDS.get(code, f"failed with exit code {code}, see above")
        return f"{self.workflow.name} {due.isoformat()}: {problem}"
