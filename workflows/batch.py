"""``batch``: many scenes and scans through one pool; one bad case never stops the rest.

Two threads prepare cases (open, digest, plan), the pool runs the tiles of all that are open, two
threads finish them (write, verify, report): all beside one another.
"""

from __future__ import annotations

import logging
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
from pipeline.domain import CaseRecord
from pipeline.errors import LeaseHeldError, PipelineError, PlanError, no_space
from pipeline.execution.feed import FairFeed
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.ports import Guard
from pipeline.segment_image import ImageTiles, segment_images
from workflows.backend import make_backend
from workflows.batch_case import BatchCase, Layout, Shared
from workflows.batch_papers import BatchPapers
from workflows.config import SegmentOptions
from workflows.image_run import ImageRun
from workflows.interrupt import never
from workflows.planning import Resolved, traced_reach
from workflows.run_dir import RunDir, canonical_digest, file_digest
from workflows.sources import Candidate, find_sources
from workflows.workplace import workplace

log = logging.getLogger(__name__)

THREADS = 2
"""That prepare, and that finish; both wait for storage much of the time."""

OPEN_CASES = 8
"""Cases that share the pool at a time, beside four for each core there is."""


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
    asked = options or SegmentOptions()
    layout = Layout.of(str(output), run_dir=asked.run_dir)
    bundles = _by_axes([load_bundle(model) for model in models])
    run = RunDir(layout.run_dir)
    run.check_ours()
    candidates = find_sources(sources, leave_out=(layout.results, layout.run_dir))
    with LeaseFile(layout.run_dir) as guard:
        run.sweep()
        layout.tables.mkdir(parents=True, exist_ok=True)
        return _Batch(layout, bundles, asked, guard=guard).go(candidates, stop)


def _by_axes(bundles: Sequence[Bundle]) -> Mapping[int, Bundle]:
    found: dict[int, Bundle] = {}
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
        self._ledger = CaseLedgerFile(layout.run_dir / "ledger", owner=f"pid{time.time_ns()}")
        self._feed, self._halt, self._first = FairFeed(), threading.Event(), threading.Event()
        self._open: dict[str, BatchCase] = {}
        self._images: dict[str, ImageTiles] = {}
        self._resolved: Resolved | None = None
        self._tracking_run: str | None = None
        self._fatal: Exception | None = None

    def go(self, candidates: Sequence[Candidate], stop: Callable[[], bool]) -> dict[str, Any]:
        """Every case, and then the table."""
        self._papers = BatchPapers(
            self._layout, self._options, models=self._bundles, total=len(candidates)
        )
        try:
            with self._papers.progress:
                self._cases(candidates, stop)
                if self._fatal is not None:
                    raise self._fatal
        except BaseException:
            self._papers.fail()
            raise
        finally:
            for case in self._open.values():
                case.close()
            self._ledger.close()
        return self._papers.finish()

    def _cases(self, candidates: Sequence[Candidate], stop: Callable[[], bool]) -> None:
        todo = self._sift(candidates)
        if not todo:
            return
        # What patches torch or joins a cluster comes before there are threads.
        self._room = threading.Semaphore(OPEN_CASES + 4 * workplace(self._options).all_cores)
        for bundle in self._bundles.values():
            traced_reach(bundle, self._options.context)

        def halted() -> bool:
            return stop() or self._halt.is_set()

        with ThreadPoolExecutor(THREADS, "finish") as finishers:
            filler = threading.Thread(target=self._fill, args=(todo, halted), name="fill")
            filler.start()
            try:
                self._first.wait()
                if self._resolved is not None:
                    self._pool(halted, finishers=finishers)
            except BaseException:
                self._halt.set()
                raise
            finally:
                filler.join()

    def _pool(self, stop: Callable[[], bool], *, finishers: ThreadPoolExecutor) -> None:
        assert self._resolved is not None

        def ended(name: str) -> None:
            finishers.submit(self._finish, name)

        segment_images(
            self._feed,
            self._images,
            backend=make_backend(self._options, self._resolved, run_dir=self._layout.run_dir),
            ended=ended,
            stop=stop,
        )

    def _sift(self, candidates: Sequence[Candidate]) -> list[BatchCase]:
        """Cases that something is to be done for; the tracker's run is opened if there are any."""
        known = self._ledger.records()
        request = dict(self._options.request())
        with suppress(OSError):
            request["crf_file"] = file_digest(Path(self._options.crf))
        shared = Shared(
            layout=self._layout,
            bundles=self._bundles,
            options=self._options,
            options_digest=canonical_digest(request),
            guard=self._guard,
            ledger=self._ledger,
        )
        todo = []
        for one in candidates:
            if one.refused:
                record = CaseRecord(
                    case=one.id, state="failed", uri=str(one.path), reason=one.refused
                )
                self._papers.settled(record, computed=False)
                continue
            case = BatchCase(one, known.get(one.id), shared)
            with self._verdict(case):
                if case.up_to_date():
                    self._papers.settled(case.record, computed=False)
                else:
                    todo.append(case)
        for case in todo:
            case.queue()
        if todo:
            self._tracking_run = self._papers.start()
        return todo

    def _fill(self, todo: Sequence[BatchCase], stop: Callable[[], bool]) -> None:
        try:
            with ThreadPoolExecutor(THREADS, "prepare") as preparers:
                for case in todo:
                    while not self._room.acquire(timeout=0.2):
                        if stop():
                            return
                    if stop():
                        return
                    preparers.submit(self._prepare, case)
        finally:
            self._feed.close()
            self._first.set()

    def _prepare(self, case: BatchCase) -> None:
        with self._verdict(case):
            case.begin(tracking_run=self._tracking_run)
            if case.image is None:
                self._papers.settled(case.record, computed=False)
            else:
                self._start(case, case.image)
                return
        self._room.release()

    def _start(self, case: BatchCase, image: ImageRun) -> None:
        name = case.candidate.id
        image.tiles.observers.append(self._papers.tile_done)
        self._open[name], self._images[name] = case, image.tiles
        if not image.tiles.outcome.interrupted:  # all was done but the finishing
            self._finish(name)
            return
        self._resolved = self._resolved or image.plan.resolved
        self._feed.add(image.tiles.jobs())
        self._first.set()

    def _finish(self, name: str) -> None:
        case = self._open.pop(name)
        with self._verdict(case):
            case.finish()
            self._papers.settled(case.record, computed=True)
        case.close()
        del self._images[name]
        self._room.release()

    @contextmanager
    def _verdict(self, case: BatchCase) -> Iterator[None]:
        """What goes wrong with one case is noted; what would go wrong with all ends the batch."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  whatever it is, the other cases go on
            log.info("case %s: %s", case.candidate.id, traceback.format_exc())
            if isinstance(error, LeaseHeldError) or no_space(error):
                self._give_up(error)
                return
            try:
                case.give_up(error)
            except PipelineError as fatal:  # the ledger cannot be written
                self._give_up(fatal)
                return
            self._papers.settled(case.record, computed=case.computed)

    def _give_up(self, error: Exception) -> None:
        self._fatal = self._fatal or error
        self._halt.set()
