"""What is shipped: the wheel, installed elsewhere, beside a package of the same name."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "adapters", "workflows")

pytestmark = pytest.mark.wheel


def call(*command: object, cwd: Path, pythonpath: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": pythonpath}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(target: Path, *settings: str) -> None:
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", target)
    call("-m", "pip", "wheel", *options, *settings, ROOT, cwd=target)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for backend in ("scikit_build_core", "nanobind"):
        pytest.importorskip(backend, reason=f"the build backend {backend} is not installed")
    target = tmp_path_factory.mktemp("dist")
    build_wheel(target)
    (built,) = target.glob("terravox-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel lies unpacked, as an installer leaves it."""
    target = tmp_path_factory.mktemp("site")
    options = ("--quiet", "--no-deps", "--no-index", "--no-compile", "--target", target)
    call("-m", "pip", "install", *options, wheel, cwd=target)
    return target


def beside(installed: Path) -> str:
    """A path of the wheel and the libraries; -S keeps out the finder of an editable install."""
    return os.pathsep.join([str(installed), *(path for path in sys.path if "-packages" in path)])


def files_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def source_files(top: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel):
    """A fourth top-level name (tests, infra) would litter the user's environment."""
    tops = {name.split("/")[0] for name in files_in(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_the_native_engine_is_in_the_wheel(wheel):
    """It would be silently slower at the user's, for the sources alone install as well."""
    assert any(name.startswith("pipeline/crf/_native.") for name in files_in(wheel))


def test_without_a_compiler_the_package_is_built_all_the_same(tmp_path, monkeypatch):
    """A machine that has no compiler could not install it at all."""
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "/bin/false")
    build_wheel(tmp_path, f"--config-settings=build-dir={tmp_path / 'build'}")
    (built,) = tmp_path.glob("terravox-*.whl")
    assert not any(name.endswith(".so") for name in files_in(built))
    assert source_files("pipeline") <= files_in(built)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_of_a_package_is_in_the_wheel(wheel, package):
    """A template, a class table or a bundle left out fails only at the user's."""
    assert source_files(package) <= files_in(wheel)


def test_the_demo_bundles_are_in_the_wheel(wheel):
    """``terravox demo`` needs no data and no network."""
    bundles = {p.parent for p in (ROOT / "workflows/demo/bundles").rglob("model.yaml")}
    if not bundles:
        pytest.skip("no demo bundles yet: run make demo-bundles")
    for bundle in bundles:
        inside = f"{bundle.relative_to(ROOT)}/"
        assert {inside + "model.yaml", inside + "weights.safetensors"} <= files_in(wheel)


def test_the_installed_packages_are_those_of_this_source(installed):
    """A stale or edited copy would run under this version's name."""
    for package in PACKAGES:
        for name in sorted(source_files(package)):
            assert (installed / name).read_bytes() == (ROOT / name).read_bytes(), name


def test_beside_a_decoy_the_installed_packages_are_found_by_their_path(installed, tmp_path):
    """A directory named pipeline is common, and so is an editable install of another version."""
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise SystemExit('the decoy')\n")
    script = tmp_path / "elsewhere" / "show.py"
    script.parent.mkdir()
    script.write_text(
        "import adapters, pipeline, pipeline.domain, workflows\n"
        "print(pipeline.__file__, adapters.__file__, workflows.__file__, sep='\\n')\n"
    )
    shown = call("-S", script, cwd=tmp_path, pythonpath=beside(installed)).splitlines()
    assert [Path(line).parent for line in shown] == [installed / package for package in PACKAGES]


def test_the_command_starts_beside_a_decoy(installed, tmp_path):
    """The console script is what users run, from wherever their data lies."""
    if not (ROOT / "workflows" / "cli.py").exists():
        pytest.skip("workflows/cli.py is not written yet")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise SystemExit('the decoy')\n")
    command = ("-S", installed / "bin" / "terravox", "--help")
    shown = call(*command, cwd=tmp_path, pythonpath=beside(installed))
    assert "segment" in shown
