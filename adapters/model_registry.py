"""Bundles in an MLflow model registry: alias -> version -> a verified directory."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.mlflow_quiet import import_mlflow
from pipeline.errors import BundleError, StoreError
from pipeline.models.bundle import MODEL_FILE, PROGRAM_FILE, WEIGHTS_FILE, Bundle, load_bundle

log = logging.getLogger(__name__)

SCHEME = "models:/"
_REFERENCE = re.compile(r"models:/(?P<name>\w[\w .-]*)(?:@(?P<alias>[\w.-]+)|/(?P<version>\d+))")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReference:
    """``models:/name@alias`` or ``models:/name/VERSION``, taken apart."""

    name: str
    alias: str | None
    version: str | None

    @classmethod
    def parse(cls, uri: str) -> ModelReference:
        """Raises BundleError for what is neither.

        >>> ModelReference.parse("models:/landcover@champion")
        ModelReference(name='landcover', alias='champion', version=None)
        """
        found = _REFERENCE.fullmatch(uri)
        if found is None:
            raise BundleError(f"{uri} names no model: write models:/NAME@ALIAS or models:/NAME/3")
        return cls(**found.groupdict())


class ModelRegistry:
    """A registry of bundles at an MLflow URI. Nothing that it holds is ever unpickled."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        prefix = "sqlite:///"
        if uri.startswith(prefix):
            file = Path(uri.removeprefix(prefix)).absolute()
            if not file.is_file():  # MLflow would create an empty one
                raise BundleError(f"there is no model registry at {uri}: name the one that is used")
            self._uri = f"{prefix}{file}"

    def version(self, reference: ModelReference) -> str:
        """The version that ``reference`` stands for at this moment.

        Raises:
            BundleError: there is no such model or alias.
            StoreError: the registry cannot be asked.
        """
        if reference.version is not None:
            return reference.version
        what = f"models:/{reference.name}@{reference.alias}"
        with self._asked(what):
            found = self._client().get_model_version_by_alias(reference.name, reference.alias)
        return str(found.version)

    def fetch(self, name: str, version: str, *, into: Path) -> Bundle:
        """The bundle of ``name``/``version`` in ``into/name/version``, downloaded unless there.

        Its weights match their SHA-256. A half-fetched one never carries the final name; what a
        killed process left is deleted, so that one process at a time may fetch into a directory.

        Raises:
            BundleError: there is no such version, or its files are no bundle.
            StoreError: the registry cannot be asked, or the disk is full.
        """
        place = into / name / version
        if place.is_dir():
            try:
                return _verified(place)
            except BundleError as error:
                log.warning("%s; fetched again", error)
                shutil.rmtree(place)
        uri = f"{SCHEME}{name}/{version}"
        with self._asked(uri):
            place.parent.mkdir(parents=True, exist_ok=True)
            for left in place.parent.glob(".fetch-*"):
                shutil.rmtree(left)
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=".fetch-") as scratch:
                found = self._download(name, version, into=Path(scratch) / "found")
                draft = Path(scratch) / "bundle"
                draft.mkdir()
                # Nothing else belongs to a bundle.
                for file in (MODEL_FILE, WEIGHTS_FILE, PROGRAM_FILE):
                    if (found / file).is_file():
                        (found / file).rename(draft / file)
                try:
                    _verified(draft)
                except BundleError as error:
                    problem = str(error).replace(f"{draft}", uri)
                    raise BundleError(f"{uri} at {_shown(self._uri)}: {problem}") from error
                draft.rename(place)
        return load_bundle(place)

    def _download(self, name: str, version: str, *, into: Path) -> Path:
        from mlflow.artifacts import download_artifacts

        # Not models:/NAME/VERSION, which MLflow looks up in the registry of its global settings.
        source = self._client().get_model_version_download_uri(name, version)
        into.mkdir()
        return Path(
            download_artifacts(artifact_uri=source, dst_path=str(into), tracking_uri=self._uri)
        )

    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        """MLflow's errors as ours; what is absent apart from what is out of order."""
        import_mlflow()
        from alembic.util import CommandError
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (MlflowException, SQLAlchemyError, CommandError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            asked = f"{what} at {_shown(self._uri)}"
            absent = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
            if getattr(error, "error_code", None) in absent:
                raise BundleError(f"{asked}: {reason}") from error
            raise StoreError(f"{asked} could not be fetched: {reason}; try again") from error


def _verified(path: Path) -> Bundle:
    bundle = load_bundle(path)
    with bundle.weights_file.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != bundle.weights_sha256:
        raise BundleError(
            f"{bundle.weights_file} has SHA-256 {found[:12]}.., {MODEL_FILE} says"
            f" {bundle.weights_sha256[:12]}..: changed or cut short"
        )
    return bundle


def _shown(uri: str) -> str:
    """``uri`` without its password."""
    return re.sub(r"//[^/@\s]+@", "//***@", uri)
