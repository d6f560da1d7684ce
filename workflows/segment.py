"""``segment``: one raster or volume to a finished mask; the wiring of adapters and pipeline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from adapters.lease_file import LeaseFile
from adapters.ledger_file import LedgerFile
from adapters.uri import open_source
from adapters.zarr_store import ZarrStore
from pipeline.errors import PlanError
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.ports import Backend, Guard, Record
from pipeline.segment_image import Outcome, segment_image
from pipeline.segment_tile import SegmentTiles
from pipeline.stitching.scores import ScoreSink
from workflows.config import SegmentOptions, ray_address
from workflows.finish import Product, check_output, finishing_mark, lost_chunks, write_product
from workflows.manifest import default_run_dir, manifest, peak_memory
from workflows.planning import SegmentPlan, make_plan, workers
from workflows.progress import RunProgress
from workflows.publish import Publisher
from workflows.run_dir import RunDir, file_digest, read_json, read_plan, write_json

log = logging.getLogger(__name__)


def never() -> bool:
    """A run that is not told to stop."""
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmentation:
    """One source, one bundle, one output, and how to go about it."""

    source: Path
    output: Path
    bundle: Bundle
    options: SegmentOptions = field(default_factory=SegmentOptions)

    @property
    def run(self) -> RunDir:
        """Where plan, ledger and stores are kept."""
        return RunDir((self.options.run_dir or default_run_dir(self.output)).resolve())


def segment(
    source: str | Path,
    output: str | Path,
    *,
    model: str | Path,
    options: SegmentOptions | None = None,
    stop: Callable[[], bool] = never,
) -> dict[str, Any]:
    """Segment one raster or volume; run again, it resumes; run once more, it does nothing.

    Args:
        source: a GeoTIFF, VRT or NIfTI.
        output: the mask: ``.tif`` for rasters, ``.nii`` or ``.nii.gz`` for volumes.
        model: a bundle directory.
        options: as ``terravox segment --help`` lists them.
        stop: asked between tiles; True drains the run.

    Returns:
        The manifest; ``status`` is done, partial or interrupted.

    Raises:
        PipelineError: one line that says what was asked, what was found and what to do.
    """
    job = Segmentation(
        source=Path(source).absolute(),
        output=Path(output).absolute(),
        bundle=load_bundle(model),
        options=options or SegmentOptions(),
    )
    return run_segmentation(job, stop=stop)


def run_segmentation(job: Segmentation, *, stop: Callable[[], bool]) -> dict[str, Any]:
    """The same for a job whose bundle is loaded."""
    started = time.monotonic()
    opened = open_source(str(job.source), volume=job.options.volume)
    run = job.run
    check_output(job.output, source=job.source, info=opened.info, run=run)
    if job.output.exists() and not job.options.fresh:
        finished = _finished(job)
        if finished is not None:
            log.warning("%s is finished already; nothing to do", job.output)
            return finished
    # A request that cannot be planned leaves no directory behind, and --fresh deletes nothing.
    known = None if job.options.fresh else read_plan(run)
    make_plan(opened, job.bundle, job.options, case=case_of(job.source), found=known)
    with LeaseFile(run.path) as guard:
        if job.options.fresh:
            run.clear()
        return _Run(job, guard, started).go(stop)


def _finished(job: Segmentation) -> dict[str, Any] | None:
    """The manifest of this very request; None when this run directory has yet to finish it.

    Raises PlanError for an output that something else wrote.
    """
    run, found = job.run, None
    done = read_json(run.manifest)
    plan = read_plan(run)
    if plan is not None:
        case = case_of(job.source)
        source = open_source(str(job.source), volume=job.options.volume)
        found = make_plan(source, job.bundle, job.options, case=case, found=plan)
        same = found.request_digest == plan["request_digest"]
        if same and done is not None and done.get("output_sha256") == file_digest(job.output):
            return done if done["status"] == "done" else None
        mark = read_json(finishing_mark(run))
        if same and mark is not None and mark.get("output") == str(job.output.resolve()):
            return None
    raise PlanError(
        f"{job.output} exists and was not made by this command"
        f" ({'other source, model or options' if plan else 'no run directory beside it'}):"
        " choose another output, or add --fresh to replace it"
    )


def plan_only(source: str | Path, *, model: str | Path, options: SegmentOptions) -> dict[str, Any]:
    """What ``segment`` would do, as plan.json would hold it. Raises what ``segment`` raises."""
    path = Path(source).absolute()
    opened = open_source(str(path), volume=options.volume)
    return make_plan(opened, load_bundle(model), options, case=case_of(path)).as_json()


def case_of(source: Path) -> str:
    """Identifier of a scene or scan: its file name without suffixes."""
    return source.name.split(".")[0]


class _Run:
    """What is open while the lease is held."""

    def __init__(self, job: Segmentation, guard: Guard, started: float) -> None:
        self.job, self.guard, self.started = job, guard, started
        self.run = job.run
        self.console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
        self.source = open_source(
            str(job.source), volume=job.options.volume, scratch=self.run.scratch
        )
        self.plan = self._plan()
        self.mask = self._store(self.run.mask, dtype=job.bundle.mask_dtype)
        self.product = Product(
            source=self.source,
            source_path=job.source,
            bundle=job.bundle,
            plan=self.plan,
            output=job.output,
            run=self.run,
        )

    def go(self, stop: Callable[[], bool]) -> dict[str, Any]:
        """Tiles, then the product, then the papers."""
        publisher = Publisher(self.product, self.job.options)
        publisher.start()
        new: list[Record] = []
        outcome = self._tiles(stop, observers=[new.append, publisher.tile_done])
        allowed = len(outcome.failed) <= self.job.options.allow_failed
        written = allowed and not outcome.interrupted
        if written:
            write_product(self.product, store=self.mask)
        values = manifest(
            self.product,
            outcome,
            written=written,
            seconds=time.monotonic() - self.started,
            peak_bytes=peak_memory(new),
        )
        return publisher.finish(values, outcome=outcome, store=self.mask)

    def _tiles(
        self, stop: Callable[[], bool], *, observers: list[Callable[[Record], None]]
    ) -> Outcome:
        ledger = LedgerFile(self.run.ledger, owner=f"pid{time.time_ns()}")
        known = self._trusted(ledger)
        progress = RunProgress(
            total=len(self.plan.tiles), known=known, file=self.run.progress, console=self.console
        )
        with closing(ledger), progress:
            return segment_image(
                self.plan.tiles,
                self._work(),
                backend=self._backend(),
                ledger=ledger,
                observers=[*observers, progress],
                stop=stop,
            )

    def _trusted(self, ledger: LedgerFile) -> list[Record]:
        """Records of tiles that are done and whose chunk still holds what they say."""
        self.mask.sweep()
        done = [r for r in ledger.records().values() if r.status == "done"]
        lost = set(lost_chunks(done, self.plan, self.mask))
        for record in done:
            if record.key in lost:
                log.warning("tile %d: its chunk is damaged; done again", record.key.number)
                ledger.append(Record(key=record.key, status="failed", error="chunk damaged"))
        if done:
            log.warning("resuming: %d of %d tiles are done", len(done), len(self.plan.tiles))
        return [record for record in done if record.key not in lost]

    def _plan(self) -> SegmentPlan:
        job, found = self.job, read_plan(self.run)
        plan = make_plan(
            self.source, job.bundle, job.options, case=case_of(job.source), found=found
        )
        if found is None:
            write_json(self.run.plan, plan.as_json())
        elif found["fingerprint"] != plan.tiles.fingerprint:
            raise PlanError(
                f"{self.run.path} holds another run (source, model, options or versions differ):"
                " choose another --run-dir, or add --fresh to start over"
            )
        for note in plan.notes:
            log.warning("%s", note)
        return plan

    def _store(self, path: Path, *, dtype: str) -> ZarrStore:
        grid = self.plan.sweep.grid
        fill = self.job.bundle.mask_nodata
        return ZarrStore.create(path, shape=grid.shape, chunks=grid.tile, dtype=dtype, fill=fill)

    def _scores(self) -> ScoreSink | None:
        dtype = self.job.options.scores
        if dtype == "none":
            return None
        grid, classes = self.plan.sweep.grid, len(self.job.bundle.classes)
        store = ZarrStore.create(
            self.run.scores,
            shape=(classes, *grid.shape),
            chunks=(classes, *grid.tile),
            dtype=dtype,
            fill=0,
        )
        return ScoreSink(store, dtype)

    def _work(self) -> SegmentTiles:
        plan, resolved = self.plan, self.plan.resolved
        return SegmentTiles(
            source=self.source,
            channels=plan.channels,
            bundle=self.job.bundle,
            device=resolved.device,
            precision=resolved.precision,
            context=resolved.context,
            threads=resolved.threads,
            padded_shape=plan.sweep.grid.padded_shape,
            crf=plan.crf,
            mask=self.mask,
            scores=self._scores(),
            guard=self.guard,
        )

    def _backend(self) -> Backend:
        options = self.job.options
        if options.backend == "serial":
            from pipeline.execution.serial import SerialBackend

            return SerialBackend()
        address = ray_address()
        from pipeline.execution.ray_pool import RayBackend

        return RayBackend(
            run_dir=self.run.path,
            workers=min(workers(options, self.plan.resolved), len(self.plan.tiles)),
            gpus_per_worker=1 if self.plan.resolved.device == "cuda" else 0,
            address=address,
        )
