"""One case of a batch: is it up to date, what is to be done, what became of it."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.ledger_file import CaseLedgerFile
from adapters.mlflow_tracker import NoTracker
from adapters.uri import open_source
from pipeline.domain import CaseRecord, CaseState
from pipeline.errors import (
    CrfError,
    ExecutionError,
    PipelineError,
    PlanError,
    RegionError,
    SourceError,
)
from pipeline.models.bundle import Bundle
from pipeline.ports import Guard
from workflows.case import Case
from workflows.config import SegmentOptions
from workflows.finish import Product, check_output
from workflows.image_run import ImageRun
from workflows.manifest import default_run_dir
from workflows.planning import SegmentPlan, make_plan
from workflows.publish import Publisher
from workflows.run_dir import RunDir, canonical_digest, file_digest, read_json, read_plan
from workflows.sources import Candidate, stamp

log = logging.getLogger(__name__)

VERDICTS = (SourceError, PlanError, CrfError, RegionError)
"""About the input itself: trying again would end alike."""

SUFFIX = {2: ".tif", 3: ".nii.gz"}


class PoisonError(ExecutionError):
    """A case that kills workers."""


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
        """A directory, or a pattern. Raises PlanError for a pattern without a run directory."""
        path = Path(output).absolute()
        if "{id}" not in output:
            return cls(
                pattern=str(path / "{id}"),
                run_dir=(run_dir or default_run_dir(path)).resolve(),
                tables=path,
            )
        if run_dir is None:
            raise PlanError(f"-o {output}: a pattern needs --run-dir, for state and tables")
        return cls(pattern=str(path), run_dir=run_dir.resolve(), tables=run_dir.resolve())

    @property
    def results(self) -> Path:
        """The folder that holds all masks, and nothing that is a source."""
        return Path(self.pattern.partition("{id}")[0] + "x").parent

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
        self.candidate, self._shared = candidate, shared
        self._known = None if shared.options.fresh else known
        self._ours = known.output if known else ""
        self.record = CaseRecord(
            case=candidate.id, state="queued", uri=str(candidate.path), output=self._ours
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
        if known.key not in [shared.key(content, model) for model in models] or not _stands(known):
            return False
        self.record = known
        return True

    def queue(self) -> None:
        """Note that something is to be done; what was known of the case stays known."""
        self._shared.ledger.append(replace(self._known or self.record, state="queued", reason=""))

    def begin(self, *, tracking_run: str | None) -> None:
        """Open, plan, and ``image``; None where nothing is to be done after all.

        Raises what ``segment`` raises for this source.
        """
        self._started, self._judging = time.monotonic(), True
        shared, known = self._shared, self._known
        run = shared.layout.run(self.candidate.id)
        case, bundle = self._open(run)
        begun = known if known is not None and known.key == self.record.key else None
        if begun is not None and _stands(begun):
            self.record = replace(begun, stamp=self.record.stamp, uri=str(case.path))
            shared.ledger.append(self.record)
            return
        plan = self._plan(case, bundle, run)
        self._judging = False
        output = shared.layout.output(case.name, case.source.info.ndim)
        if begun is not None and begun.output:
            output = Path(begun.output)  # of a pattern that has changed since
        product = Product(case=case, bundle=bundle, plan=plan, output=output, run=run)
        if self._adopt(product):
            return
        self._claim(product)
        self.note("running", output=str(output), tiles=len(plan.tiles))
        publisher = Publisher(product, NoTracker(tracking_run))
        self.image = ImageRun(product, shared.options, guard=shared.guard, publisher=publisher)
        self.computed = True

    def finish(self) -> None:
        """Write the product and note it. Raises ExecutionError when tiles have failed."""
        assert self.image is not None
        values, outcome = self.image.finish(), self.image.tiles.outcome
        if not values["output"]:
            first, count = outcome.failed[0], len(outcome.failed)
            kind = PoisonError if any(r.deaths for r in outcome.failed) else ExecutionError
            raise kind(f"{count} of {outcome.total} tiles failed; the first: {first.error}")
        self._done(values, self.image.product.output)
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
        verdict = self._judging and bool(self.record.key) and isinstance(error, VERDICTS)
        state: CaseState = "quarantined" if verdict or isinstance(error, PoisonError) else "failed"
        self.note(state, reason=text)
        shutil.rmtree(self._shared.layout.run(self.candidate.id).scratch, ignore_errors=True)

    def note(self, state: CaseState, **changes: Any) -> None:
        """Into the ledger."""
        seconds = round(time.monotonic() - self._started, 3) if self._started else 0.0
        self.record = replace(self.record, state=state, seconds=seconds, **changes)
        self._shared.ledger.append(self.record)

    def _done(self, manifest: Mapping[str, Any], output: Path) -> None:
        self.note(
            "done",
            output=str(output),
            output_stamp=stamp([output]),
            output_sha256=manifest["output_sha256"],
            tiles=manifest["tiles"]["total"],
            classes=tuple(manifest["classes"]),
        )

    def _adopt(self, product: Product) -> bool:
        """Note as done what was finished but not noted: the driver was killed in between.

        What else an earlier run finished here is deleted: its input or output has changed.
        """
        run, found = product.run, read_json(product.run.manifest)
        if found is None:
            return False
        output, same = product.output, found["fingerprint"] == product.plan.tiles.fingerprint
        here = output.exists() and found["output"] == str(output.resolve())
        if same and here and file_digest(output) == found["output_sha256"]:
            self._done(found, output)
            return True
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
        return Case(name=candidate.id, path=here, source=source, digest=content), bundle

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
        plan = make_plan(case, bundle, self._shared.options, found=found)
        if found is not None and found["fingerprint"] != plan.tiles.fingerprint:
            run.clear()
        return plan

    def _claim(self, product: Product) -> None:
        """Refuse to replace what this batch did not make. Raises ExecutionError, SourceError."""
        output, case = product.output, product.case
        if output.exists() and self._ours != str(output) and not self._shared.options.fresh:
            raise ExecutionError(
                f"{output} exists and was not made by this batch: move it away, or add --fresh"
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        check_output(output, source=case.path, info=case.source.info, run=product.run)


def _stands(known: CaseRecord) -> bool:
    """Whether a settled record's verdict, or its mask, is still what it was."""
    if known.state != "done":
        return known.state == "quarantined"
    output = Path(known.output)
    try:
        return stamp([output]) == known.output_stamp or file_digest(output) == known.output_sha256
    except (SourceError, OSError):
        return False
