"""Runs in MLflow, written by the driver alone; a tracker that fails never fails the run."""

from __future__ import annotations

import importlib
import logging
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from adapters.mlflow_quiet import import_mlflow
from adapters.scratch_file import make_once

log = logging.getLogger(__name__)

PARAMS_PER_BATCH = 100
METRICS_PER_BATCH = 1000
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000
"""MLflow's limits: a batch or value beyond them is refused."""

CUT_MARK = " ... [cut]"

RUN_STATUS = {
    "done": "FINISHED",
    "partial": "FAILED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}
"""MLflow has no word for a partial run; the tag ``terravox.status`` holds ours."""


def import_for(uri: str) -> None:
    """Import what a tracker at ``uri`` needs, which takes seconds; nothing is opened."""
    import_mlflow()
    if _database_file(uri) is not None:
        importlib.import_module("mlflow.store.tracking.sqlalchemy_store")


class NoTracker:
    """Tracking switched off, or done by another: ``run_id`` is then of the run it goes into."""

    error: str | None = None

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id

    def start(self, *, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Do nothing."""

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Do nothing."""

    def finish(self, status: str, *, artifacts: Iterable[Path]) -> None:
        """Do nothing."""


class MlflowTracker:
    """One MLflow run, through a client of its own: no global state, no active run.

    The first failure is logged once and kept in ``error``. Figures that could not be sent wait
    until ``finish``, so that a slow server is asked only twice.
    """

    def __init__(
        self, uri: str, *, experiment: str, run_name: str, run_id: str | None = None
    ) -> None:
        self.error: str | None = None
        """What went wrong first, in one line; None while all is well."""

        self.run_id: str | None = None
        """The run at the tracker, once ``start`` has opened it."""

        self._database = _database_file(uri)
        self._uri = uri if self._database is None else f"sqlite:///{self._database}"
        self._experiment = experiment
        self._run_name = run_name
        self._resumed = run_id
        self._client: Any = None
        self._unsent: list[Any] = []

    def start(self, *, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Open the run, or the one given at construction; params it has already are kept."""
        with self._recorded("open the run"):
            self._client = _quiet_client(self._uri, database=self._database)
            known = self._open_run()
            self._log(
                params={_name(k): v for k, v in params.items() if _name(k) not in known},
                tags={_name(k): v for k, v in tags.items()},
            )

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Log figures at ``step`` (tiles done)."""
        if self.run_id is None:
            return
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._unsent += [Metric(_name(k), float(v), now_ms, step) for k, v in values.items()]
        if self.error is None:
            with self._recorded("log metrics"):
                self._send()

    def finish(self, status: str, *, artifacts: Iterable[Path]) -> None:
        """Close the run as ``RUN_STATUS`` says, then send what is left, and the files."""
        if self.run_id is None:
            return
        with self._recorded("finish the run"):  # one block: a dead server is waited for once
            self._client.set_tag(self.run_id, "terravox.status", status)
            self._client.set_terminated(self.run_id, RUN_STATUS[status])
            self._send()
            for path in artifacts:
                self._client.log_artifact(self.run_id, str(path))

    def _open_run(self) -> set[str]:
        """Set ``run_id`` and return the names of the params that the run has already."""
        if self._resumed is not None:
            run = self._client.get_run(self._resumed)
            self._client.update_run(self._resumed, status="RUNNING")
        else:
            run = self._client.create_run(self._experiment_id(), run_name=self._run_name)
        self.run_id = run.info.run_id
        return set(run.data.params)

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        beside = self._database and (self._database.parent / "mlartifacts").as_uri()
        try:
            return str(self._client.create_experiment(self._experiment, beside))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return str(self._client.get_experiment_by_name(self._experiment).experiment_id)

    def _log(self, *, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        for batch in _batches([Param(k, _cut(v, PARAM_CHARACTERS)) for k, v in params.items()]):
            self._client.log_batch(self.run_id, params=batch)
        for batch in _batches([RunTag(k, _cut(v, TAG_CHARACTERS)) for k, v in tags.items()]):
            self._client.log_batch(self.run_id, tags=batch)

    def _send(self) -> None:
        while self._unsent:
            self._client.log_batch(self.run_id, metrics=self._unsent[:METRICS_PER_BATCH])
            del self._unsent[:METRICS_PER_BATCH]

    @contextmanager
    def _recorded(self, doing: str) -> Iterator[None]:
        try:
            yield
        except _tracking_errors() as error:
            if self.error is None:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                without_password = re.sub(r"//[^/@\s]+@", "//***@", reason)
                self.error = f"MLflow could not {doing}: {without_password}"
                log.warning("%s; the run goes on without it", self.error)


def _quiet_client(uri: str, *, database: Path | None) -> Any:
    if database is not None:
        make_once(database, write=_write_tables)
    return import_mlflow().MlflowClient(tracking_uri=uri)


def _write_tables(sink: IO[bytes]) -> None:
    """A database with MLflow's tables.

    Made elsewhere: MLflow takes seconds, refuses what a killed process left half made for ever,
    and two processes that make it at once get in each other's way.
    """
    with tempfile.TemporaryDirectory(prefix="terravox-mlflow-") as folder:
        draft = Path(folder) / "mlflow.db"
        client = import_mlflow().MlflowClient(tracking_uri=f"sqlite:///{draft}")
        client.search_experiments(max_results=1)
        sink.write(draft.read_bytes())


def _tracking_errors() -> tuple[type[Exception], ...]:
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, CommandError, OSError)


def _database_file(uri: str) -> Path | None:
    """The file of an SQLite URI, absolute: the driver changes its folder; None for a server."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).absolute() if uri.startswith(prefix) else None


def _batches(items: list[Any]) -> Iterator[list[Any]]:
    for first in range(0, len(items), PARAMS_PER_BATCH):
        yield items[first : first + PARAMS_PER_BATCH]


def _name(text: str) -> str:
    """``text`` with what MLflow refuses in names, such as brackets, replaced."""
    return re.sub(r"[^\w\-. :/]", "_", text)[:250]


def _cut(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    return text[: characters - len(CUT_MARK)] + CUT_MARK
