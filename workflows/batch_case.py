"""One case of a batch: is it up to date, what is to be done, what became of it."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from adapters.ledger_file import CaseLedgerFile
from adapters.mlflow_tracker import NoTracker
from adapters.uri import is_known, open_source
from pipeline.domain import CaseRecord, CaseState
from pipeline.errors import (
    CrfError,
    ExecutionError,
    PipelineError,
    PlanError,
    RegionError,
    SourceError,
)
from pipeline.execution.queue import MAX_DEATHS
from pipeline.models.bundle import Bundle
from pipeline.ports import Guard
from workflows.case import Case
from workflows.config import SegmentOptions
from workflows.finish import Product, check_output, finishing_mark, mark_output
from workflows.image_run import ImageRun
from workflows.manifest import default_run_dir
from workflows.planning import make_plan
from workflows.publish import Publisher
from workflows.run_dir import RunDir, canonical_digest, file_digest, read_json, read_plan
from workflows.segment_plan import SegmentPlan
from workflows.sources import Candidate, stamp

log = logging.getLogger(__name__)

VERDICTS = (SourceError, PlanError, CrfError, RegionError)
"""About the input itself: trying again would end alike."""

SUFFIX = {2: ".tif", 3: ".nii.gz"}


MAX_TRIES = 3
"""Runs in which tiles of one input may fail before it is no longer tried."""


class TilesFailedError(ExecutionError):
    """Tiles that could not be done; ``poison`` where they kill workers."""

    def __init__(self, text: str, *, poison: bool) -> None:
        super().__init__(text)
        self.poison = poison


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where a batch puts things."""

    pattern: str
    """Absolute path of a mask, with ``{id}`` in it and without its suffix."""

    run_dir: Path
    tables: Path
    """Directory of ``cases.csv`` and ``cases.json``."""

    @classmethod
    def of(cls, output: str, *, run_dir: Path | None) -> Layout:
        """A directory, or a pattern. Raises PlanError for what cannot be either."""
        path = Path(os.path.realpath(output))
        if "{id}" not in output:
            if not output or (path.exists() and not path.is_dir()):
                raise PlanError(f"-o {output!r}: give a directory, or a path with {{id}} in it")
            place = Path(os.path.realpath(run_dir or default_run_dir(path)))
            return cls(pattern=str(path / "{id}"), run_dir=place, tables=path)
        if run_dir is None:
            raise PlanError(f"-o {output}: a pattern needs --run-dir, for state and tables")
        if set("{}") & set(output.replace("{id}", "")) or is_known(output):
            raise PlanError(f"-o {output}: a pattern takes {{id}} alone, and no suffix of a format")
        place = Path(os.path.realpath(run_dir))
        return cls(pattern=str(path), run_dir=place, tables=place)

    @property
    def results(self) -> Path:
        """The folder that holds all masks."""
        return Path(self.pattern.partition("{id}")[0] + "x").parent

    def check(self) -> None:
        """Refuse places that cannot be written to. Raises PlanError."""
        for folder in (self.tables, self.results, self.run_dir):
            there = next(place for place in (folder, *folder.parents) if place.exists())
            if not os.access(there, os.W_OK) or not there.is_dir():
                raise PlanError(f"{folder}: {there} cannot be written to; choose another place")
        for table in ("cases.csv", "cases.json"):
            if (self.tables / table).is_dir():
                raise PlanError(f"{self.tables / table} is a directory; the table goes there")

    def output(self, case: str, ndim: int) -> Path:
        """The mask of a case."""
        return Path(self.pattern.replace("{id}", case) + SUFFIX[ndim])

    def run(self, case: str) -> RunDir:
        """The run directory of a case."""
        return RunDir(self.run_dir / "cases" / case)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What all cases of a batch have in common."""

    layout: Layout
    bundles: Mapping[int, Bundle]
    """By number of axes."""

    options: SegmentOptions
    options_digest: str
    judge: str
    """Digest of the software that gives verdicts."""

    sources: frozenset[str]
    """Real paths of all sources: no mask may take the place of one."""

    guard: Guard
    ledger: CaseLedgerFile

    def key(self, content: str, model: str) -> str:
        """While it stands, a result does."""
        return canonical_digest(
            {"content": content, "model": model, "options": self.options_digest}
        )

    @property
    def all_models(self) -> str:
        """In the key of a case that none of the models takes."""
        return " ".join(sorted(bundle.digest for bundle in self.bundles.values()))


class BatchCase:
    """From a candidate to a line of the table; used by one thread at a time."""

    def __init__(self, candidate: Candidate, known: CaseRecord | None, shared: Shared) -> None:
        self.candidate, self._shared, self._before = candidate, shared, known
        self._known = None if shared.options.fresh else known
        output = known.output if known else ""
        self.record = CaseRecord(
            case=candidate.id, state="queued", uri=str(candidate.path), output=output
        )
        self.image: ImageRun | None = None
        self.computed = False
        self._started, self._judging = 0.0, False

    def up_to_date(self) -> bool:
        """Whether the source's files, model and options are those of a settled record.

        Looks at sizes and times alone. Raises SourceError for a source that is not there.
        """
        self.record = replace(self.record, stamp=self.candidate.stamp())
        known = self._known
        if known is None or not self.record.stamp or known.stamp != self.record.stamp:
            return False
        shared, content = self._shared, known.content or known.stamp
        models = [*(bundle.digest for bundle in shared.bundles.values()), shared.all_models]
        keys = [shared.key(content, model) for model in models]
        return known.key in keys and self._keep(known)

    def queue(self) -> None:
        """Note that something is to be done; what was known of the case stays known."""
        self._shared.ledger.append(replace(self._before or self.record, state="queued"))

    def begin(self, *, tracking_run: Callable[[], str | None]) -> None:
        """Open, plan, and ``image``; None where nothing is to be done after all.

        Raises what ``segment`` raises for this source.
        """
        self._started, self._judging = time.monotonic(), True
        shared, known = self._shared, self._known
        run = shared.layout.run(self.candidate.id)
        case, bundle = self._open(run)
        begun = known if known is not None and known.key == self.record.key else None
        if begun is not None and self._keep(begun):
            return
        output = shared.layout.output(case.name, case.source.info.ndim)
        if begun is not None and begun.output:
            output = Path(begun.output)  # of a pattern that has changed since
        ours = self._ours(output, run)
        plan = self._plan(case, bundle, run)
        self._judging = False
        product = Product(case=case, bundle=bundle, plan=plan, output=output, run=run)
        if self._adopt(product):
            return
        self._claim(product, ours=ours)
        self.note("running", output=str(output), tiles=len(plan.sweep))
        publisher = Publisher(product, NoTracker(tracking_run()))
        self.image = ImageRun(product, shared.options, guard=shared.guard, publisher=publisher)
        self.computed = True

    def finish(self) -> None:
        """Write the product and note it. Raises TilesFailedError, and what finishing raises."""
        assert self.image is not None
        values, outcome = self.image.finish(), self.image.outcome
        failed, said = outcome.failed, ""
        if failed:
            said = f"{len(failed)} of {outcome.total} tiles failed; the first: {failed[0].error}"
        if not values["output"]:
            poison = any(record.deaths >= MAX_DEATHS for record in failed)
            raise TilesFailedError(said, poison=poison)
        self._done(values, self.image.product.output, reason=said)
        if not failed:  # else they are tried again
            shutil.rmtree(self.image.run.mask, ignore_errors=True)  # the mask is its own proof now

    def close(self) -> None:
        """Let go of what is open."""
        if self.image is not None:
            self.image.close()
            self.image = None

    def give_up(self, error: Exception) -> None:
        """Note why: ``quarantined`` for what lies in the input, else ``failed``."""
        text = " ".join(str(error).split())
        if not isinstance(error, PipelineError):
            text = f"{type(error).__name__}: {text}"
        before, tries, state = self._before, 0, "failed"
        if isinstance(error, TilesFailedError):
            same = before is not None and before.key == self.record.key
            tries = (before.tries if before and same else 0) + 1
            if error.poison or tries >= MAX_TRIES:
                state = "quarantined"
        elif self._is_verdict(error):
            state = "quarantined"
        self.note(cast("CaseState", state), reason=text, tries=tries, judge=self._shared.judge)
        shutil.rmtree(self._shared.layout.run(self.candidate.id).scratch, ignore_errors=True)

    def _is_verdict(self, error: Exception) -> bool:
        """Whether the input is at fault: not the machine, nor a share that is away."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno is not None:
                return False
            cause = cause.__cause__
        if not (self._judging and self.record.key and isinstance(error, VERDICTS)):
            return False
        try:
            return self.candidate.stamp() == self.record.stamp
        except SourceError:
            return False

    def note(self, state: CaseState, **changes: Any) -> None:
        """Into the ledger."""
        seconds = round(time.monotonic() - self._started, 3) if self._started else 0.0
        self.record = replace(self.record, state=state, seconds=seconds, **changes)
        self._shared.ledger.append(self.record)

    def _done(self, manifest: Mapping[str, Any], output: Path, *, reason: str = "") -> None:
        self.note(
            "done",
            output=str(output),
            output_stamp=stamp([output]),
            output_sha256=manifest["output_sha256"],
            tiles=manifest["tiles"]["total"],
            classes=tuple(manifest["classes"]),
            reason=reason,
        )

    def _keep(self, known: CaseRecord) -> bool:
        """Take over a record whose verdict, or whose mask, still stands; whether it does."""
        if known.state == "quarantined":
            if known.judge != self._shared.judge:
                return False
            self.record = known
            return True
        if not known.output_sha256 or known.reason:
            return False
        try:
            mark = stamp([Path(known.output)])
            if (
                mark != known.output_stamp
                and file_digest(Path(known.output)) != known.output_sha256
            ):
                return False
        except (SourceError, OSError):
            return False
        found = {"state": "done", "output_stamp": mark, "stamp": self.record.stamp}
        self.record = replace(known, uri=str(self.candidate.path), **cast("Any", found))
        if self.record != known:
            self._shared.ledger.append(self.record)
        return True

    def _adopt(self, product: Product) -> bool:
        """Note as done what was finished but not noted: the driver was killed in between.

        What else an earlier run finished here is deleted: its input or output has changed.
        """
        run, output = product.run, product.output
        try:
            found = read_json(run.manifest)
            if found is None:
                return False
            same = found["fingerprint"] == product.plan.tiles.fingerprint
            if same and found["status"] == "partial":
                return False  # its failed tiles are tried again
            here = output.exists() and found["output"] == str(output.resolve())
            if same and here and file_digest(output) == found["output_sha256"]:
                self._done(found, output)
                return True
        except (PlanError, KeyError) as error:
            log.warning("%s is damaged (%s); begun anew", run.manifest, error)
        run.clear()
        return False

    def _open(self, run: RunDir) -> tuple[Case, Bundle]:
        """The source with its content's digest, and the bundle for its number of axes."""
        candidate, shared, known = self.candidate, self._shared, self._known
        here, mark = candidate.path, self.record.stamp
        # What cannot even be opened is known by its files alone.
        self._identify("", shared.all_models)
        volume = shared.options.volume if here.name.lower().endswith((".nii", ".nii.gz")) else None
        source = open_source(str(here), volume=volume, series=candidate.series, scratch=run.scratch)
        info = source.info
        same = known is not None and bool(mark) and known.stamp == mark
        content = (known.content if known and same else "") or source.digest()
        bundle = shared.bundles.get(info.ndim)
        self._identify(content, bundle.digest if bundle else shared.all_models)
        if bundle is None:
            only = next(iter(shared.bundles.values()))
            raise SourceError(
                f"{candidate.id} has {info.ndim} axes, but the network of {only.name} takes"
                f" {only.architecture.dims}: give a --model that takes {info.ndim}"
            )
        self.record = replace(self.record, model=f"{bundle.name} {bundle.version}")
        case = Case(
            name=candidate.id,
            path=here,
            source=source,
            digest=content,
            volume=volume,
            series=candidate.series,
        )
        return case.within(shared.options.aoi, scratch=run.scratch), bundle

    def _identify(self, content: str, model: str) -> None:
        identity = content or self.record.stamp
        key = self._shared.key(identity, model) if identity else ""
        self.record = replace(self.record, content=content, key=key)

    def _plan(self, case: Case, bundle: Bundle, run: RunDir) -> SegmentPlan:
        if self._shared.options.fresh:
            run.clear()
        try:
            found = read_plan(run)
        except PlanError as error:
            log.warning("%s; begun anew", error)
            found = None
            run.clear()
        plan = make_plan(case, bundle, self._shared.options, found=found, alone=False)
        if found is not None and found["fingerprint"] != plan.tiles.fingerprint:
            run.clear()
        return plan

    def _ours(self, output: Path, run: RunDir) -> bool:
        """Whether the batch may replace what is there: it made that, and nobody changed it."""
        known = self._before
        if self._shared.options.fresh or not output.exists():
            return True
        if known is None or known.output != str(output):
            return False
        if known.output_sha256:
            return file_digest(output) == known.output_sha256
        return finishing_mark(run).exists()  # killed after it had its name

    def _claim(self, product: Product, *, ours: bool) -> None:
        """Refuse to destroy anything. Raises ExecutionError."""
        output, case = product.output, product.case
        if os.path.realpath(output) in self._shared.sources:
            raise ExecutionError(f"{output} is a source of this batch: choose another output")
        if not ours:
            raise ExecutionError(
                f"{output} was not made by this batch, or was changed since: move it away, or add"
                " --fresh"
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            check_output(output, source=case.path, info=case.source.info, run=product.run)
        except SourceError as error:
            raise ExecutionError(str(error)) from error
        if output.exists():  # its run directory may have been cleared
            product.run.path.mkdir(parents=True, exist_ok=True)
            mark_output(product.run, output)
