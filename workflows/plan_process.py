"""Planning in a process of its own: torch and the weights, which it needs, end with it.

The driver of a run on Ray computes nothing. Left in it, what planning loads would take half a
gigabyte until the run ends.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from pipeline.errors import ExecutionError
from pipeline.models.bundle import Bundle
from workflows.case import Case
from workflows.config import SegmentOptions
from workflows.segment_plan import SegmentPlan


def plan_apart(
    case: Case,
    bundle: Bundle,
    options: SegmentOptions,
    *,
    found: Mapping[str, Any] | None,
    meanwhile: Callable[[], None],
) -> SegmentPlan:
    """As ``make_plan``; ``meanwhile`` is called once the process is on its way.

    Raises what ``make_plan`` raises, and ExecutionError where the process is killed.
    """
    asked = pickle.dumps((_log_level(), case, bundle, options, found))
    with _process() as process:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead: told below
            process.stdin.write(asked)
            process.stdin.flush()
        meanwhile()
        answer, _ = process.communicate()
    if not answer:
        raise ExecutionError(f"the process that plans the run ended with {process.returncode}")
    result: SegmentPlan | Exception = pickle.loads(answer)  # noqa: S301  our own process wrote it
    if isinstance(result, Exception):
        raise result
    return result


@contextmanager
def _process() -> Iterator[subprocess.Popen[bytes]]:
    """The process; killed where it is not waited for to its end."""
    # As this process would import: not from the folder it happens to be in (-P).
    path = os.pathsep.join(os.path.abspath(part) for part in sys.path)
    with subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,  # a Ctrl-C drains the run: it does not end the plan
    ) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def _log_level() -> int:
    return logging.getLogger().getEffectiveLevel()


def main(asked: BinaryIO, answer: BinaryIO) -> None:
    """Make the plan asked for on one stream, and write it, or what was raised, to the other."""
    try:
        level, case, bundle, options, found = pickle.load(asked)  # noqa: S301  the driver wrote it
    except (EOFError, pickle.UnpicklingError):
        sys.exit(1)  # and was killed meanwhile: nobody waits for a plan
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=level)
    from workflows.planning import make_plan

    result: SegmentPlan | Exception
    try:
        result = make_plan(case, bundle, options, found=found)
    except Exception as error:  # noqa: BLE001  the driver raises it
        error.add_note(traceback.format_exc())  # for --debug: a traceback is not pickled
        result = error
    pickle.dump(result, answer)


if __name__ == "__main__":
    stdout = os.dup(1)
    os.dup2(2, 1)  # a network of somebody's own may print
    with suppress(BrokenPipeError), os.fdopen(stdout, "wb") as pipe:  # the driver was killed
        main(sys.stdin.buffer, pipe)
