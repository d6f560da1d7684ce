"""``schedule tick``: one scheduled time of a workflow, once, whoever asks and how often."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adapters.lease_file import LeaseFile
from adapters.model_registry import SCHEME, ModelReference, ModelRegistry
from adapters.tick_store import ModelPin, Tick, TickStore
from pipeline.errors import PipelineError, PlanError
from pipeline.models.bundle import load_bundle
from pipeline.ports import Guard
from workflows.interrupt import never
from workflows.workflow_file import Workflow, read_workflow

log = logging.getLogger(__name__)

TICKS_FILE = "ticks.sqlite"


def tick(
    workflow: str | Path, *, now: datetime | None = None, stop: Callable[[], bool] = never
) -> dict[str, Any]:
    """Do what a workflow's latest scheduled time asks for; asked again, do nothing.

    A tick that was interrupted, killed, partial or failed is gone on with, with the model versions
    that it began with. One that a later tick has overtaken is superseded: the later does its work.

    Args:
        workflow: the workflow file.
        now: the tick is the last scheduled time at or before it; aware; the present if None.
        stop: asked between tiles; True drains the run.

    Returns:
        ``workflow, tick, status, ran, started, finished, models, counts, reason, output``;
        ``ran`` is False where there was nothing to do.

    Raises:
        LeaseHeldError: another process works on this workflow.
        PipelineError: what kept the whole tick from being done, one line.
    """
    plan = read_workflow(workflow)
    if now is not None and now.tzinfo is None:
        raise PlanError(f"the time {now.isoformat()} has no offset: add Z, or one such as +02:00")
    present = max(now or _present(), _present())
    try:
        scheduled = plan.last_tick(now or present)
    except (OverflowError, ValueError) as error:
        raise PlanError(f"no time before {now} is scheduled by {plan.cron!r}") from error
    with LeaseFile(plan.state) as guard:
        store = TickStore(plan.state / TICKS_FILE, workflow=plan.name)
        row = store.begin(scheduled, now=present)
        if row.settled:
            return _told(plan, row, ran=False)
        return _told(plan, _Run(plan, store, scheduled, guard=guard).go(row.models, stop), ran=True)


class _Run:
    """A tick while it is under way and the lease is held."""

    def __init__(
        self, workflow: Workflow, store: TickStore, scheduled: datetime, *, guard: Guard
    ) -> None:
        self.workflow, self.store, self.scheduled, self.guard = workflow, store, scheduled, guard

    def go(self, pinned: Iterable[ModelPin], stop: Callable[[], bool]) -> Tick:
        """Run the batch and note how it ended: whatever happens, the row says so."""
        try:
            result = self._batch(self._models(pinned), stop)
        except KeyboardInterrupt:
            self._finish("interrupted", reason="stopped at once")
            raise
        except Exception as error:
            self._finish("failed", reason=_line(error))
            raise
        counts, status = result["counts"], result["status"]
        reason = "" if status == "done" else _words(counts)
        self._finish(status, counts=counts, reason=reason)
        done = self.store.get(self.scheduled)
        assert done is not None
        return done

    def _batch(self, bundles: list[Path], stop: Callable[[], bool]) -> Mapping[str, Any]:
        from workflows.batching import batch  # torch waits until there is something to do

        plan = self.workflow
        return batch(
            plan.sources,
            plan.output_at(self.scheduled),
            models=bundles,
            options=plan.options.model_copy(update={"run_dir": plan.state / "run"}),
            stop=stop,
        )

    def _finish(self, status: Any, **said: Any) -> None:
        self.guard.check()
        self.store.finish(self.scheduled, status, now=_present(), **said)

    def _models(self, pinned: Iterable[ModelPin]) -> list[Path]:
        """Bundle directories of this tick, pinned before anything runs."""
        known = {pin.uri: pin for pin in pinned}
        found = [self._model(uri, known.get(uri)) for uri in self.workflow.models]
        self.store.pin(self.scheduled, [pin for pin, _ in found])
        return [path for _, path in found]

    def _model(self, uri: str, pin: ModelPin | None) -> tuple[ModelPin, Path]:
        if not uri.startswith(SCHEME):
            bundle = load_bundle(uri)
            name, version = bundle.name, str(bundle.version)
        else:
            registry, asked = ModelRegistry(self._registry(uri)), ModelReference.parse(uri)
            name, version = asked.name, pin.version if pin else registry.version(asked)
            bundle = registry.fetch(name, version, into=self.workflow.state / "models")
        if pin is not None and pin.digest != bundle.digest:
            # The old bytes are gone; with the new ones every case is computed anew, none mixed.
            log.warning("%s has changed since the tick began: its cases are computed anew", uri)
        used = ModelPin(uri=uri, name=name, version=version, digest=bundle.digest)
        return used, bundle.path

    def _registry(self, uri: str) -> str:
        asked = self.workflow.options.tracking_uri
        here = os.environ.get("MLFLOW_REGISTRY_URI") or (asked if asked != "none" else None)
        found = here or os.environ.get("MLFLOW_TRACKING_URI")
        if not found:
            raise PlanError(
                f"{uri} asks for an MLflow registry and none is named: set options.tracking_uri in"
                " the workflow, or MLFLOW_TRACKING_URI"
            )
        return found


def sentence(told: Mapping[str, Any]) -> str:
    """One line for people about what ``tick`` returned."""
    head = f"{told['workflow']} {told['tick']}: {told['status']}"
    if not told["ran"]:
        return f"{head} already, {told['reason'] or told['finished']}; nothing to do"
    return f"{head}; {_words(told['counts']) or 'no cases'} -> {told['output']}"


def _told(workflow: Workflow, row: Tick, *, ran: bool) -> dict[str, Any]:
    output = workflow.output_at(datetime.fromisoformat(row.tick))
    return {**asdict(row), "ran": ran, "output": output}


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {state}" for state, number in counts.items() if number)


def _line(error: Exception) -> str:
    known = isinstance(error, PipelineError)
    return " ".join((f"{error}" if known else f"{type(error).__name__}: {error}").split())


def _present() -> datetime:
    return datetime.now(UTC)
