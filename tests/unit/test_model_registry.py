"""Bundles from a real MLflow registry: aliases, versions, damage, and what is no bundle."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scenes import fresh

from adapters.model_registry import ModelReference, ModelRegistry
from pipeline.errors import BundleError, StoreError
from pipeline.models.bundle import load_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A registry with model ``land``: versions 1 and 2 are bundles, 3 a pickle, 4 cut short."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("registry")
    (folder / "pickle").mkdir()
    (folder / "pickle" / "model.pkl").write_bytes(pickle.dumps(Bomb(folder / "exploded")))
    fresh(folder / "one", seed=1)
    fresh(folder / "two", seed=2)
    shutil.copytree(folder / "two", folder / "cut")
    weights = folder / "cut" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    client = MlflowClient(tracking_uri=uri(folder), registry_uri=uri(folder))
    client.create_registered_model("land")
    for name in ("one", "two", "pickle", "cut"):
        client.create_model_version("land", source=str(folder / name))
    client.set_registered_model_alias("land", "champion", "1")
    return folder


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def move_alias(folder: Path, version: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri(folder), registry_uri=uri(folder))
    client.set_registered_model_alias("land", "champion", version)


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_an_alias_is_asked_anew_and_a_version_stands_for_itself(folder):
    """A tick must see the alias as it is now; a pinned version must need no registry."""
    registry, champion = ModelRegistry(uri(folder)), ModelReference.parse("models:/land@champion")
    assert registry.version(champion) == "1"
    move_alias(folder, "2")
    assert registry.version(champion) == "2"
    move_alias(folder, "1")
    assert registry.version(ModelReference.parse("models:/land/7")) == "7"


def test_a_fetched_version_is_the_registered_bundle_and_nothing_else(folder, tmp_path):
    """What the registry adds to a download is no part of a bundle; a bundle elsewhere is a copy."""
    registry = ModelRegistry(uri(folder))
    for version, source in (("1", "one"), ("2", "two")):
        bundle = registry.fetch("land", version, into=tmp_path)
        assert bundle.digest == load_bundle(folder / source).digest
        assert bundle.path == tmp_path / "land" / version
        bundle.network()
    assert tree(tmp_path) == [
        f"land/{version}/{name}"
        for version in "12"
        for name in ("model.yaml", "weights.safetensors")
    ]
    assert tree(folder / "one") == ["model.yaml", "weights.safetensors"]


def test_what_is_there_is_not_fetched_again(folder, tmp_path, monkeypatch):
    """Ticks go on when the registry is down, and gigabytes are copied once."""
    registry = ModelRegistry(uri(folder))
    first = registry.fetch("land", "1", into=tmp_path)
    monkeypatch.setattr(ModelRegistry, "_download", None)
    assert registry.fetch("land", "1", into=tmp_path) == first


def test_a_damaged_copy_is_fetched_again_and_leftovers_go(folder, tmp_path, caplog):
    """A disk error, or a process killed while it fetched, must not need a person."""
    registry = ModelRegistry(uri(folder))
    weights = registry.fetch("land", "1", into=tmp_path).path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[::-1])
    (tmp_path / "land" / ".fetch-killed").mkdir()
    with caplog.at_level(logging.WARNING):
        registry.fetch("land", "1", into=tmp_path).network()
    assert "fetched again" in caplog.text
    assert [path.name for path in (tmp_path / "land").iterdir()] == ["1"]


@pytest.mark.parametrize(("version", "words"), [("3", "no file model.yaml"), ("4", "cut short")])
def test_a_version_that_is_no_sound_bundle_is_refused(folder, tmp_path, version, words):
    """A pickle from a registry is somebody's program: it is not run, and nothing is kept."""
    with pytest.raises(BundleError) as refusal:
        ModelRegistry(uri(folder)).fetch("land", version, into=tmp_path)
    message = str(refusal.value)
    assert f"models:/land/{version} at sqlite:///" in message
    assert words in message
    assert "\n" not in message
    assert ".fetch-" not in message
    assert not list((tmp_path / "land").iterdir())
    assert not (folder / "exploded").exists()


def test_an_absent_model_alias_or_version_is_named(folder, tmp_path):
    """A typing error in a workflow must read as one."""
    registry = ModelRegistry(uri(folder))
    for text in ("models:/land@winner", "models:/sea@champion"):
        with pytest.raises(BundleError, match=text):
            registry.version(ModelReference.parse(text))
    with pytest.raises(BundleError, match="models:/land/99"):
        registry.fetch("land", "99", into=tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "models:/land",
        "models:/land/latest",
        "models:/land/Production",
        "models:/land@a/b",
        "models:/../up@champion",
        "models:/..@champion",
        "models:/a/b/1",
        "runs:/land/1",
    ],
)
def test_a_reference_that_could_be_two_things_or_leave_the_folder_is_refused(text):
    """``latest`` is whatever somebody tried out last; ``..`` is another directory."""
    with pytest.raises(BundleError, match="names no model"):
        ModelReference.parse(text)


def test_an_absent_registry_is_not_made(tmp_path):
    """MLflow would make an empty one, and say that it has no such model."""
    with pytest.raises(BundleError, match="no model registry"):
        ModelRegistry(uri(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_registry_that_cannot_be_asked_is_another_error(folder, tmp_path):
    """To try again helps there, and does not for a name that is not there."""
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(StoreError, match="try again") as refusal:
        ModelRegistry(uri(tmp_path)).version(ModelReference.parse("models:/land@champion"))
    assert "\n" not in str(refusal.value)


def test_importing_the_adapter_does_not_import_mlflow():
    """A tick that has nothing to do would take seconds."""
    code = (
        "import sys, adapters.model_registry, workflows.schedule\n"
        "sys.exit(bool({'mlflow', 'torch', 'ray', 'rasterio'} & set(sys.modules)))"
    )
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
