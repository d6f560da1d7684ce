"""The driver of a run on Ray has its plan made in another process."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from own_networks import chatty, own_bundle

from pipeline.errors import ExecutionError, PlanError
from pipeline.models.bundle import Bundle, load_bundle
from workflows.case import open_case
from workflows.config import SegmentOptions
from workflows.plan_process import plan_apart
from workflows.planning import make_plan
from workflows.segment_plan import SegmentPlan

ASKED = SegmentOptions(tile=256, crf="off", precision="fp32", workers=2)


def apart(scene: Path, bundle: Bundle, options: SegmentOptions = ASKED) -> SegmentPlan:
    case = open_case(scene, options)
    return plan_apart(case, bundle, options, found=None, meanwhile=lambda: None)


def test_the_plan_of_another_process_is_the_plan(scene: Path, slim: Path) -> None:
    """A Ray run and a serial one of the same request would have two fingerprints."""
    bundle = load_bundle(slim)
    plan = make_plan(open_case(scene, ASKED), bundle, ASKED)
    assert apart(scene, bundle).as_json() == plan.as_json()


def test_what_planning_finds_wrong_is_raised_as_if_it_had_planned_here(
    scene: Path, slim: Path
) -> None:
    """Exit codes and the one line of an error depend on the kind and the words of it."""
    with pytest.raises(PlanError, match=r"--tile 250: must be a multiple") as caught:
        apart(scene, load_bundle(slim), ASKED.model_copy(update={"tile": 250}))
    assert "workflows/planning.py" in caught.value.__notes__[0]  # what --debug shows


def test_a_plan_whose_process_is_killed_ends_the_run_with_a_reason(
    scene: Path, slim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory runs out, the driver would read a plan from nothing."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ExecutionError, match="the process that plans the run ended with 1"):
        apart(scene, load_bundle(slim))


@pytest.mark.parametrize("heard", [0, 100, None])
def test_a_plan_that_nobody_waits_for_any_more_ends_without_a_word(
    scene: Path, slim: Path, heard: int | None
) -> None:
    """Who kills the driver would find a traceback of another process on the screen."""
    request = (logging.WARNING, open_case(scene, ASKED), load_bundle(slim), ASKED, None)
    process = subprocess.Popen(
        [sys.executable, "-m", "workflows.plan_process"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stdin.write(pickle.dumps(request)[:heard])
    process.stdin.close()
    assert process.stderr.read() == b""
    process.wait()


def test_a_network_that_prints_does_not_garble_the_plan(scene: Path, tmp_path: Path) -> None:
    """What somebody's own network prints would be read as part of the answer."""
    bundle = own_bundle(tmp_path / "own", chatty(), stride=1, entry_point="own_networks:chatty")
    assert apart(scene, bundle).receptive_field == (1, 1)


def test_the_driver_of_a_ray_run_never_loads_torch(scene: Path, slim: Path, tmp_path: Path) -> None:
    """It would hold 500 MiB until the end of every run, and import it for seconds."""
    script = (
        "import sys\n"
        "from workflows.config import SegmentOptions\n"
        "from workflows.segmenting import segment\n"
        "asked = SegmentOptions(tile=256, crf='off', workers=1, tracking_uri='none')\n"
        f"done = segment({str(scene)!r}, 'mask.tif', model={str(slim)!r}, options=asked)\n"
        "print(done['status'], 'torch' in sys.modules)"
    )
    env = os.environ | {"HOME": str(tmp_path)}
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert answer.stdout.split("\n")[-2] == "done False", answer.stderr
