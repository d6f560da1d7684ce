"""``segment``: one raster or volume to a finished mask; the wiring of adapters and pipeline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from adapters.lease_file import LeaseFile
from adapters.ledger_file import LedgerFile
from adapters.uri import open_source
from adapters.zarr_store import ZarrStore
from pipeline.errors import PlanError
from pipeline.models.bundle import load_bundle
from pipeline.ports import Backend, Guard, Record
from pipeline.segment_image import Outcome, segment_image
from pipeline.segment_tile import SegmentTiles
from pipeline.stitching.scores import ScoreSink
from workflows.config import SegmentOptions, ray_address
from workflows.finish import (
    Product,
    check_output,
    finishing_mark,
    lost_chunks,
    mark_output,
    write_product,
)
from workflows.manifest import default_run_dir, manifest
from workflows.planning import make_plan, workers
from workflows.progress import RunProgress
from workflows.publish import Publisher
from workflows.run_dir import RunDir, file_digest, read_json, read_plan, write_json

log = logging.getLogger(__name__)


def never() -> bool:
    """A run that is not told to stop."""
    return False


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
    started = time.monotonic()
    asked, bundle = options or SegmentOptions(), load_bundle(model)
    source_path, target = Path(source).absolute(), Path(output).absolute()
    run = RunDir((asked.run_dir or default_run_dir(target)).resolve())
    image = open_source(str(source_path), volume=asked.volume, scratch=run.scratch)
    run.check_ours()
    check_output(target, source=source_path, info=image.info, run=run)
    # A request that cannot be planned leaves no directory behind, and --fresh deletes nothing.
    known = None if asked.fresh else read_plan(run)
    plan = make_plan(image, bundle, asked, case=case_of(source_path), found=known)
    product = Product(
        source=image,
        source_path=source_path,
        bundle=bundle,
        plan=plan,
        output=target,
        run=run,
    )
    if target.exists() and not asked.fresh:
        finished = _finished(product, known)
        if finished is not None:
            log.warning("%s is finished already; nothing to do", target)
            return finished
    with LeaseFile(run.path) as guard:
        if asked.fresh:
            run.clear()
            mark_output(product)
        return _Run(product, asked, guard=guard, started=started).go(stop)


def _finished(product: Product, known: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The manifest of this very request; None when this run directory has yet to finish it.

    Raises PlanError for an output that something else wrote.
    """
    run, output = product.run, product.output
    if known is not None and known["request_digest"] == product.plan.request_digest:
        done, mark = read_json(run.manifest), read_json(finishing_mark(run))
        here, same = str(output.resolve()), known["fingerprint"] == product.plan.tiles.fingerprint
        if done is not None and same and done.get("output") == here:
            if done.get("output_sha256") == file_digest(output):
                return done if done["status"] == "done" else None
        elif done is None and mark is not None and mark.get("output") == here:
            return None
    raise PlanError(
        f"{output} exists and was not made by this command"
        f" ({'source, model, options, versions or its bytes' if known else 'no run directory'}"
        f"{' differ' if known else ' beside it'}):"
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

    def __init__(
        self, product: Product, options: SegmentOptions, *, guard: Guard, started: float
    ) -> None:
        self.product, self.options, self.guard = product, options, guard
        self.run, self.plan, self.started = product.run, product.plan, started
        self.console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
        self.run.sweep()
        self._keep_plan()
        self.mask = self._store(self.run.mask, dtype=product.bundle.mask_dtype)

    def go(self, stop: Callable[[], bool]) -> dict[str, Any]:
        """Tiles, then the product, then the papers."""
        self.run.manifest.unlink(missing_ok=True)  # its presence means that the product exists
        publisher = Publisher(self.product, self.options)
        publisher.start()
        try:
            return self._publish(publisher, stop)
        except BaseException:
            publisher.fail()
            raise

    def _publish(self, publisher: Publisher, stop: Callable[[], bool]) -> dict[str, Any]:
        new: list[Record] = []
        outcome = self._tiles(stop, observers=[new.append, publisher.tile_done])
        allowed = len(outcome.failed) <= self.options.allow_failed
        written = allowed and not outcome.interrupted
        if written:
            self.guard.check()
            write_product(self.product, store=self.mask)
            self.guard.check()
        values = manifest(
            self.product,
            outcome,
            written=written,
            new=new,
            seconds=time.monotonic() - self.started,
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
        scores = self._scores()
        self.mask.sweep()
        done = [r for r in ledger.records().values() if r.status == "done"]
        stores = [self.mask] if scores is None else [self.mask, scores.store]
        lost = set(lost_chunks(done, self.plan, stores))
        for record in done:
            if record.key in lost:
                log.warning("tile %d: its chunk is damaged; done again", record.key.number)
                ledger.append(Record(key=record.key, status="failed", error="chunk damaged"))
        if done:
            log.warning("resuming: %d of %d tiles are done", len(done), len(self.plan.tiles))
        return [record for record in done if record.key not in lost]

    def _keep_plan(self) -> None:
        """Write plan.json, or prove that the one that is there is this run's."""
        found = read_plan(self.run)
        if found is None:
            write_json(self.run.plan, self.plan.as_json())
        elif found["fingerprint"] != self.plan.tiles.fingerprint:
            raise PlanError(
                f"{self.run.path} holds another run (source, model, options or versions differ):"
                " choose another --run-dir, or add --fresh to start over"
            )
        self.console.print(self.plan.summary)
        for note in self.plan.notes:
            log.warning("%s", note)

    def _store(self, path: Path, *, dtype: str) -> ZarrStore:
        grid = self.plan.sweep.grid
        fill = self.product.bundle.mask_nodata
        return ZarrStore.create(path, shape=grid.shape, chunks=grid.tile, dtype=dtype, fill=fill)

    def _scores(self) -> ScoreSink | None:
        dtype = self.options.scores
        if dtype == "none":
            return None
        grid, classes = self.plan.sweep.grid, len(self.product.bundle.classes)
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
            source=self.product.source,
            channels=plan.channels,
            bundle=self.product.bundle,
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
        options = self.options
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
