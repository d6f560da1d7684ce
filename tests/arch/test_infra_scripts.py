"""Scripts of infra/ against stand-ins for their clusters, and the commands given to terravox."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from workflows import cli

INFRA = Path(__file__).parents[2] / "infra"
SUBMIT = INFRA / "kubernetes" / "submit.sh"
SBATCH = INFRA / "slurm" / "terravox.sbatch"
RAYJOB = INFRA / "kubernetes" / "rayjob.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a script left behind."""

    code: int
    err: str
    calls: list[str]
    """One line a call of a stand-in."""


class Stage:
    """A directory of stand-ins, first on PATH; each writes down how it was called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._calls = folder, folder / "calls"
        (folder / "bin").mkdir()

    def stand_in(self, program: str, body: str) -> None:
        path = self.folder / "bin" / program
        path.write_text(f'#!/bin/sh\necho "{program} $*" >> {self._calls}\n{body}\n')
        path.chmod(0o755)

    def play(self, *command: object, **environment: str) -> Answer:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [str(word) for word in command],
            cwd=self.folder,
            env={"PATH": path, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        calls = self._calls.read_text().splitlines() if self._calls.exists() else []
        return Answer(code=done.returncode, err=done.stderr, calls=calls)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def submit(stage: Stage, *states: str) -> Answer:
    """``submit.sh`` where asking for the RayJob gives ``states`` in turn, the last for ever."""
    for number, state in enumerate(states):
        (stage.folder / f"state{number}").write_text(state)
    kubectl = shutil.which("kubectl")
    stage.stand_in(
        "kubectl",
        f"""case "$1" in
get) n=$(grep -c '^kubectl get' {stage.folder}/calls); i=$((n - 1))
  [ $i -lt {len(states)} ] || i={len(states) - 1}
  cat {stage.folder}/state$i; [ "$(cat {stage.folder}/state$i)" != error ] ;;
patch) {kubectl} "$@" ;;
create) cp "$3" {stage.folder}/created.yaml ;;
esac""",
    )
    script = SUBMIT.read_text().replace("export HOME=/tmp", f"export HOME={stage.folder}")
    copy = stage.folder / "submit.sh"
    copy.write_text(script)
    settings = {"TICK": "terravox-29384728", "OWNER_UID": "0a1b", "POLL_SECONDS": "0"}
    return stage.play("sh", copy, RAYJOB, **settings)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on this machine")
def test_a_tick_makes_its_rayjob_and_waits_for_its_end(stage):
    """The next tick would start beside a run that is still going."""
    answer = submit(stage, "", "t ", "t Running", "error", "t Running", "t Complete")
    assert answer.code == 0, answer.err
    assert sum(call.startswith("kubectl create") for call in answer.calls) == 1
    made, kept = yaml.safe_load((stage.folder / "created.yaml").read_text()), RAYJOB.read_text()
    assert made["spec"] == yaml.safe_load(kept)["spec"]
    assert made["metadata"]["name"] == "terravox-29384728"
    assert made["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": "terravox-29384728", "uid": "0a1b"}
    ]


def test_a_second_pod_of_a_tick_finds_the_rayjob_of_the_first(stage):
    """An evicted pod would leave two clusters on one run directory."""
    answer = submit(stage, "t Running", "t Complete")
    assert answer.code == 0, answer.err
    assert not any(call.startswith(("kubectl create", "kubectl patch")) for call in answer.calls)


@pytest.mark.parametrize("last", ["t Failed", ""])
def test_a_failed_or_deleted_rayjob_fails_its_tick_for_good(stage, last):
    """The schedule would look healthy, or try again what has used up its retries."""
    assert submit(stage, "t Running", last).code == 2
    (cron,) = (d for d in documents("schedule.yaml") if d["kind"] == "CronJob")
    (rule,) = cron["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])


def test_a_tick_that_cannot_read_the_cluster_ends_with_another_code(stage):
    """A moment without the API server would count as a failed run."""
    assert submit(stage, "error").code not in {0, 2}


def documents(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / "kubernetes" / file).read_text()))


def slurm(stage: Stage, *, ray: str, code: int) -> Answer:
    """The script on a job of two nodes, with ``ray`` as the body of a stand-in for Ray."""
    stage.stand_in("scontrol", "echo node1; echo node2")
    stage.stand_in("srun", 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"')
    stage.stand_in("ray", ray)
    stage.stand_in(
        "terravox", f'test "$RAY_AUTH_MODE" = token && echo "$RAY_AUTH_TOKEN" > token; exit {code}'
    )
    settings = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "16",
    }  # fmt: skip
    return stage.play("bash", SBATCH, "batch", "a b.tif", "-o", "out", **settings)


RUNS = 'while [ "$1" != -- ]; do shift; done; shift; "$@"'


@pytest.mark.parametrize("code", [0, 3, 75])
def test_the_slurm_job_ends_with_the_commands_exit_code(stage, code):
    """A partial run would look done in the accounting, and a finished one failed."""
    answer = slurm(stage, ray=RUNS, code=code)
    assert answer.code == code, answer.err
    (called,) = (call for call in answer.calls if call.startswith("terravox"))
    assert called == "terravox batch a b.tif -o out --ray-address auto"
    assert re.fullmatch(r"[0-9a-f]{64}\n", (stage.folder / "token").read_text())
    assert not list(stage.folder.glob("*.code"))


def test_a_slurm_job_whose_ray_does_not_start_fails(stage):
    """``ray symmetric-run`` ends with 0 there, and nothing would have been computed."""
    answer = slurm(stage, ray="exit 0", code=0)
    assert answer.code == 1
    assert "Ray did not start on node1" in answer.err


def given_to_terravox() -> list[str]:
    """Every command line that a file of infra/ hands to terravox, without its first word."""
    readme = (INFRA / "README.md").read_text()
    found = re.findall(r"^terravox (.*?)(?:\s+#.*)?$", readme, re.M)
    found += re.findall(r"^docker (?:run|compose) .*? (?:driver|terravox:\S+) (.*)$", readme, re.M)
    found += re.findall(r"^sbatch \S+\.sbatch (.*)$", readme, re.M)
    found += re.findall(r"^# terravox (.*)$", (INFRA / "workflow.example.yaml").read_text(), re.M)
    found += [documents("rayjob.yaml")[0]["spec"]["entrypoint"].removeprefix("terravox ")]
    service = (INFRA / "systemd" / "terravox-schedule.service").read_text()
    return found + re.findall(r"^ExecStart=\S+/terravox (.*)$", service, re.M)


def parse(words: Sequence[str]) -> None:
    """Parse a command line as the command does, and run nothing."""
    command: Any = typer.main.get_command(cli.app)
    left, parent = list(words), None
    while True:
        context = command.make_context("terravox", left, parent=parent)
        if not hasattr(command, "resolve_command"):
            return
        parent, asked = context, [*context._protected_args, *context.args]
        _, command, left = command.resolve_command(context, asked)


@pytest.mark.parametrize("line", given_to_terravox())
def test_terravox_understands_what_infra_asks_of_it(line):
    """An option renamed in the command would end every scheduled run with a usage error."""
    parse(shlex.split(line))


@pytest.mark.parametrize("line", ["batch a -o b --model m --ray-addres auto", "scedule tick w"])
def test_the_parse_sees_a_planted_error(line):
    """A parse that accepts anything would prove nothing."""
    with pytest.raises(Exception, match=r"(?i)no such"):
        parse(shlex.split(line))


def test_every_kind_of_command_line_was_found():
    """A pattern that finds nothing would check nothing."""
    verbs = {line.split()[0] for line in given_to_terravox()}
    assert verbs == {"segment", "batch", "schedule"}
    assert len(given_to_terravox()) >= 7
