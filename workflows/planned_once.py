"""A run directory is taken, a request planned in it, and carried out unless that is done."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from adapters.lease_file import LeaseFile, LeaseGuard
from workflows.finish import mark_output
from workflows.run_dir import RunDir

log = logging.getLogger(__name__)

Wanted = TypeVar("Wanted")


def planned_once(
    run: RunDir,
    output: Path,
    *,
    fresh: bool,
    plan: Callable[[], tuple[Wanted, dict[str, Any] | None]],
    carry_out: Callable[[Wanted, LeaseGuard], dict[str, Any]],
) -> dict[str, Any]:
    """The manifest of what is wanted.

    Args:
        run: the directory, which nobody else works in meanwhile.
        output: what is made.
        fresh: whether to start over.
        plan: what is wanted, and the manifest where it is made already.
        carry_out: makes it.

    Raises LeaseHeldError, and what ``plan`` and ``carry_out`` raise. A request that cannot be
    planned leaves no directory behind, and ``fresh`` deletes nothing before.
    """
    with LeaseFile(run.path) as guard:  # planning may unpack a scan there
        try:
            wanted, done = plan()
        except BaseException:
            run.withdraw()
            raise
        if done is not None:
            run.withdraw()
            log.warning("%s is finished already; nothing to do", output)
            return done
        if fresh:
            run.clear()
            mark_output(run, output)
        return carry_out(wanted, guard)
