"""``batch``: many scenes and scans through one pool; one bad case never stops the rest.

Two threads prepare cases (open, digest, plan), the pool runs the tiles of all that are open, two
threads finish them (write, verify, report): all beside one another.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adapters.lease_file import LeaseFile
from adapters.ledger_file import CaseLedgerFile
from pipeline.crf.engine import pick_engine
from pipeline.domain import CaseRecord
from pipeline.errors import LeaseHeldError, PlanError, StoreError, no_space
from pipeline.execution.feed import FairFeed
from pipeline.execution.identity import software_digest
from pipeline.models.bundle import Bundle
from pipeline.ports import Guard
from pipeline.segment_image import ImageTiles, segment_images
from workflows.aoi import aoi_digest
from workflows.backend import make_backend
from workflows.batch_case import BatchCase, Layout, Shared
from workflows.batch_papers import BatchPapers, nothing
from workflows.bundle_asked import bundle_asked
from workflows.config import SegmentOptions
from workflows.crf_asked import crf_params
from workflows.image_run import ImageRun
from workflows.interrupt import never
from workflows.resolved import resolve_floats
from workflows.run_dir import RunDir, canonical_digest, file_digest
from workflows.sources import Candidate, Made, find_sources
from workflows.tracing import traced
from workflows.workplace import workers

log = logging.getLogger(__name__)

THREADS = 2
"""That prepare, and that finish; both wait for storage much of the time."""

OPEN_CASES, MOST_CASES = 4, 200
"""Cases that share the pool at a time: these, and three for each worker, which holds two tiles.
More would all be half done at the same time, and each keeps a few files open."""


def batch(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    models: Sequence[str | Path],
    options: SegmentOptions | None = None,
    stop: Callable[[], bool] = never,
) -> dict[str, Any]:
    """Segment many rasters and volumes; run again, it does only what is missing or changed.

    Args:
        sources: files, folders, globs, and CSV lists with the columns id and path.
        output: a directory; or the path of a mask with ``{id}`` in it and without suffix, which
            needs a ``run_dir`` among the options.
        models: a bundle directory for rasters, one for volumes, or both.
        options: as ``terravox batch --help`` lists them.
        stop: asked between tiles; True drains the run.

    Returns:
        What ``cases.json`` holds: status (done, partial or interrupted), counts, cases.

    Raises:
        PipelineError: what concerns all cases; what concerns one of them is in its row.
    """
    if isinstance(sources, str) or isinstance(models, str | Path):
        raise PlanError("sources and models are lists of paths: put a single one in brackets")
    asked = _anchored(options or SegmentOptions())
    layout = Layout.of(str(output), run_dir=asked.run_dir)
    lists = [os.path.realpath(source) for source in sources]
    if os.path.realpath(layout.tables / "cases.csv") in lists:
        raise PlanError(f"{layout.tables / 'cases.csv'} is the table of results: list them apart")
    bundles = _by_axes([bundle_asked(model, asked) for model in models])
    run = RunDir(layout.run_dir)
    run.check_ours(batch=True)
    layout.check()
    known = _known(layout, fresh=asked.fresh)
    made = Made(
        results=layout.results,
        outputs=frozenset(os.path.realpath(r.output) for r in known.values() if r.output),
        owners={record.case: record.uri for record in known.values()},
    )
    candidates = find_sources(sources, made)
    if not candidates:
        return nothing(layout)
    with LeaseFile(layout.run_dir) as guard:
        run.sweep()
        layout.tables.mkdir(parents=True, exist_ok=True)
        return _Batch(layout, bundles, asked, guard=guard).go(candidates, stop)


def _anchored(options: SegmentOptions) -> SegmentOptions:
    """Paths made absolute: the process enters the run directory when the pool starts."""
    update: dict[str, object] = {}
    if options.crf not in ("auto", "off"):
        update["crf"] = str(Path(options.crf).absolute())
    if options.aoi is not None:
        update["aoi"] = options.aoi.absolute()
    return options.model_copy(update=update)


def _known(layout: Layout, *, fresh: bool) -> dict[str, CaseRecord]:
    """What the ledger says. Raises StoreError for a damaged one; ``fresh`` puts it aside."""
    ledger = CaseLedgerFile(RunDir(layout.run_dir).ledger, owner="read")
    try:
        return ledger.records()
    except StoreError as error:
        if not fresh:
            raise
        aside = layout.run_dir / f"ledger-damaged-{time.time_ns()}"
        log.warning("%s; put aside as %s", error, aside.name)
        RunDir(layout.run_dir).ledger.rename(aside)
        return {}


def _by_axes(bundles: Sequence[Bundle]) -> Mapping[int, Bundle]:
    found: dict[int, Bundle] = {}
    if not bundles:
        raise PlanError("no model is given: a bundle for rasters, one for volumes, or both")
    for bundle in bundles:
        first = found.setdefault(bundle.architecture.dims, bundle)
        if first is not bundle:
            raise PlanError(
                f"{first.name} and {bundle.name} both take {bundle.architecture.dims} axes:"
                " give one --model for rasters, one for volumes, or both"
            )
    return found


class _Batch:
    """What the threads of a batch share, while the lease is held."""

    def __init__(
        self,
        layout: Layout,
        bundles: Mapping[int, Bundle],
        options: SegmentOptions,
        *,
        guard: Guard,
    ) -> None:
        self._layout, self._bundles, self._options, self._guard = layout, bundles, options, guard
        self._ledger = CaseLedgerFile(RunDir(layout.run_dir).ledger, owner=f"pid{time.time_ns()}")
        self._feed, self._halt, self._first = FairFeed(), threading.Event(), threading.Event()
        self._open: dict[str, BatchCase] = {}
        self._images: dict[str, ImageTiles] = {}
        self._todo: list[BatchCase] = []
        self._fatal: BaseException | None = None

    def go(self, candidates: Sequence[Candidate], stop: Callable[[], bool]) -> dict[str, Any]:
        """Every case, and then the table."""
        self._papers = BatchPapers(
            self._layout, self._options, models=self._bundles, total=len(candidates)
        )
        try:
            with self._papers.progress:
                self._sift(candidates)
                if self._todo:
                    self._cases(stop)
            if self._fatal is not None:
                raise self._fatal
            return self._papers.finish([case.record for case in self._todo])
        except BaseException:
            self._papers.fail()
            raise
        finally:
            for case in self._open.values():
                case.close()
            self._ledger.close()

    def _cases(self, stop: Callable[[], bool]) -> None:
        # What patches torch or joins a cluster comes before there are threads; what is asked of
        # the machine is no case's fault.
        self._floats = resolve_floats(self._options)
        for bundle in self._bundles.values():
            crf = crf_params(self._options.crf, bundle)
            if crf is not None:
                pick_engine(crf.engine, device=self._floats.device)
            traced(bundle, self._options.context)
        floats = self._floats
        actors = workers(self._options, device=floats.device, threads=floats.threads)
        self._room = threading.Semaphore(min(OPEN_CASES + 3 * actors, MOST_CASES))

        def halted() -> bool:
            return stop() or self._halt.is_set()

        with ThreadPoolExecutor(THREADS, "finish") as finishers:
            filler = threading.Thread(target=self._fill, args=(halted,), name="fill")
            filler.start()
            try:
                self._first.wait()
                if not self._halt.is_set() and self._images:
                    self._pool(halted, finishers=finishers)
            except BaseException:
                self._halt.set()
                raise
            finally:
                filler.join()

    def _pool(self, stop: Callable[[], bool], *, finishers: ThreadPoolExecutor) -> None:
        def ended(name: str) -> None:
            finishers.submit(self._watched, self._finish, name)

        floats = self._floats
        backend = make_backend(
            self._options,
            device=floats.device,
            threads=floats.threads,
            workers=workers(self._options, device=floats.device, threads=floats.threads),
            run_dir=self._layout.run_dir,
        )
        segment_images(
            self._feed,
            self._images,
            backend=backend,
            ended=ended,
            stop=stop,
        )

    def _watched(self, step: Callable[..., None], *args: Any) -> None:
        """Run a step in a thread; what it raises ends the batch, instead of nobody hearing it."""
        try:
            step(*args)
        except BaseException as error:  # noqa: BLE001  it is raised in the main thread
            self._give_up(error)

    def _sift(self, candidates: Sequence[Candidate]) -> None:
        """Settle what is up to date or refused; the rest is to be done."""
        known = self._ledger.records()
        shared = self._shared(candidates)
        for one in candidates:
            if one.refused:
                record = CaseRecord(
                    case=one.id, state="failed", uri=str(one.path), reason=one.refused
                )
                self._papers.settled(record, computed=False)
                continue
            case = BatchCase(one, known.get(one.id), shared)
            with self._verdict(case) as settled:
                if not case.up_to_date():
                    settled.clear()
            if settled:
                self._papers.settled(case.record, computed=False)
            else:
                self._todo.append(case)
        for case in self._todo:
            case.queue()

    def _shared(self, candidates: Sequence[Candidate]) -> Shared:
        request = dict(self._options.request())
        with suppress(OSError):
            request["crf_file"] = file_digest(Path(self._options.crf))
        if self._options.aoi is not None:
            request["aoi"] = aoi_digest(self._options.aoi)
        return Shared(
            layout=self._layout,
            bundles=self._bundles,
            options=self._options,
            options_digest=canonical_digest(request),
            judge=software_digest(),
            sources=frozenset(os.path.realpath(one.path) for one in candidates),
            guard=self._guard,
            ledger=self._ledger,
        )

    def _fill(self, stop: Callable[[], bool]) -> None:
        try:
            with ThreadPoolExecutor(THREADS, "prepare") as preparers:
                for case in self._todo:
                    while not self._room.acquire(timeout=0.2):
                        if stop():
                            return
                    if stop():
                        return
                    preparers.submit(self._watched, self._prepare, case, stop)
        except BaseException as error:  # noqa: BLE001  it is raised in the main thread
            self._give_up(error)
        finally:
            self._feed.close()
            self._first.set()

    def _prepare(self, case: BatchCase, stop: Callable[[], bool]) -> None:
        if stop():
            return
        with self._verdict(case) as settled:
            case.begin(tracking_run=self._papers.tracking_run)
            if case.image is not None:
                settled.clear()
        if case.image is not None and not settled:
            self._start(case, case.image)
        else:
            self._settle(case)

    def _start(self, case: BatchCase, image: ImageRun) -> None:
        name = case.candidate.id
        image.watch(self._papers.tile_done)
        self._open[name], self._images[name] = case, image.tiles
        if not image.tiles.outcome.interrupted:  # all was done but the finishing
            self._finish(name)
            return
        self._feed.add(image.tiles.jobs())
        self._first.set()

    def _finish(self, name: str) -> None:
        case = self._open[name]
        with self._verdict(case):
            case.finish()
        case.close()
        del self._open[name], self._images[name]
        self._settle(case)

    def _settle(self, case: BatchCase) -> None:
        self._room.release()
        if self._fatal is None:
            self._papers.settled(case.record, computed=case.computed)

    @contextmanager
    def _verdict(self, case: BatchCase) -> Iterator[list[BatchCase]]:
        """What goes wrong with one case is noted; what would go wrong with all ends the batch.

        Yields what the block clears where the case is not settled by it.
        """
        settled = [case]
        try:
            yield settled
        except Exception as error:
            log.info("case %s: %s", case.candidate.id, traceback.format_exc())
            if isinstance(error, LeaseHeldError) or no_space(error):
                raise
            case.give_up(error)

    def _give_up(self, error: BaseException) -> None:
        self._fatal = self._fatal or error
        self._halt.set()
        self._first.set()
