"""Rules about the source that no linter at hand checks."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "adapters", "workflows")
HEAVY = ("torch", "ray", "rasterio", "nibabel", "mlflow", "zarr")
LONGEST_FILE = 400

PYTHON_FILES = sorted(p for top in (*PACKAGES, "tests") for p in (ROOT / top).rglob("*.py"))
TEXT_SUFFIXES = {".py", ".toml", ".yaml", ".yml", ".txt", ".md", ".json", ".sh", ".cfg", ""}

# Written so that this file does not contain what it forbids.
MACHINE_PATHS = re.compile(r"(?<![\w.$}~<-])/(?:w" + r"ork|ro" + r"ot|ho" + r"me)/\w")
REGISTRY_HOSTS = re.compile(
    r"index-" + r"url|trusted-" + r"host|https?://[^\s/]*(?:artifact|nexus|devpi|mirror|:\d{4})",
    re.I,
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tracked_files() -> list[Path]:
    """What git knows and what it would add; skipped where the source came without git."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout: no list of tracked files")
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def loaded_by(code: str) -> set[str]:
    """Top-level modules that ``code`` has loaded, in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*sorted({{n.split('.')[0] for n in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("\n")[-2].split())


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_nothing_heavy(package):
    """``--help`` and every worker's start would take seconds."""
    loaded = loaded_by(f"import {package}")
    assert package in loaded
    assert not loaded & set(HEAVY)


def test_the_commands_help_loads_neither_torch_nor_ray():
    """``terravox --help`` would take seconds, and fail where torch is broken."""
    if importlib.util.find_spec("workflows.cli") is None:
        pytest.skip("workflows/cli.py is not written yet")
    loaded = loaded_by(
        "from workflows import cli\n"
        "sys.argv = ['terravox', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code"
    )
    assert "workflows" in loaded
    assert not loaded & set(HEAVY)


def test_the_verbs_of_the_command_are_functions_of_workflows():
    """A module would answer to the name instead, and ``segment(...)`` would not be callable."""
    program = (
        "import workflows as ours, {first}\n"
        "from workflows import batch, certify, plan, refine, segment, status\n"
        "assert all(callable(verb) for verb in (batch, certify, plan, refine, segment, status))\n"
        "from workflows import cli, segmenting\n"
        "assert ours.segment is segment"
    )
    for first in ("workflows", "workflows.cli", "workflows.segmenting"):
        loaded_by(program.format(first=first))
    assert "torch" not in loaded_by("from workflows import segment, status")


def calls_print(tree: ast.AST) -> bool:
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        for node in ast.walk(tree)
    )


def test_only_the_command_prints():
    """A print in a worker ends up in the middle of the JSON on stdout."""
    product = [p for p in PYTHON_FILES if name(p).split(os.sep)[0] in PACKAGES]
    printing = {name(p) for p in product if calls_print(ast.parse(p.read_text()))}
    assert printing <= {"workflows/cli.py"}
    assert calls_print(ast.parse("def f():\n    print(1)"))


def test_no_file_is_a_drawer_for_odds_and_ends():
    """A name that says nothing is where the missing noun hides."""
    assert not [name(p) for p in PYTHON_FILES if p.stem in {"utils", "util", "helpers", "common"}]


def test_no_file_is_longer_than_one_can_read_in_a_sitting():
    """A longer file has two subjects."""
    long = {
        name(p): n for p in PYTHON_FILES if (n := len(p.read_text().splitlines())) > LONGEST_FILE
    }
    assert not long


def test_test_files_have_names_of_their_own():
    """Without packages in tests, two files of one name hide each other in reports."""
    stems = [p.stem for p in PYTHON_FILES if p.name.startswith("test_")]
    assert len(stems) == len(set(stems))


def test_no_tracked_file_names_a_machine_or_a_private_registry():
    """The repository must build from nothing on any machine."""
    bad = []
    for path in tracked_files():
        if path.suffix not in TEXT_SUFFIXES:
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            if MACHINE_PATHS.search(line) or REGISTRY_HOSTS.search(line):
                bad.append(f"{name(path)}:{number}: {line.strip()[:80]}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("line", "caught"),
    [
        ("cd /wo" + "rk/main", True),
        ('open("/ro' + 'ot/data.tif")', True),
        ("file:///ho" + "me/ann/scene.tif", True),
        ("--index-" + "url https://example.org/simple", True),
        ("docs at https://example.org/work", False),
        ("framework/home", False),
        ("$HOME/home/x", False),
    ],
)
def test_the_search_for_machine_names_finds_them(line, caught):
    """A search that finds nothing would pass on anything."""
    assert bool(MACHINE_PATHS.search(line) or REGISTRY_HOSTS.search(line)) == caught


def test_a_network_comes_into_memory_without_torchs_compiler(tmp_path):
    """Every process that has a network would take 90 MiB more, and start 1.6 s later."""
    loaded = loaded_by(
        "from pathlib import Path\n"
        "from pipeline.models.bundle import load_bundle\n"
        "from workflows.model import create\n"
        "from workflows.tracing import traced\n"
        f"path = Path({str(tmp_path / 'bundle')!r})\n"
        "create(output=path, family='v3', backbone='resnet18', dims=2, bands=3, classes=4,\n"
        "       output_stride=None, seed=0)\n"
        "traced(load_bundle(path), 'window')"
    )
    assert "torch" in loaded
    assert not loaded & {"torchvision", "sympy"}


def test_what_drives_a_run_on_ray_loads_no_torch():
    """The driver would hold 300 MiB until the end of a run that it computes nothing of."""
    loaded = loaded_by("import workflows.segmenting\nimport pipeline.execution.ray_pool")
    assert "ray" in loaded
    assert "torch" not in loaded
