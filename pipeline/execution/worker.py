"""One worker: tiles pass through four stages, each a thread, so that they overlap."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import socket
import threading
import time
import traceback
from collections import OrderedDict
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.domain import Tile
from pipeline.errors import ExecutionError, LeaseHeldError, no_space
from pipeline.execution.line import Line, Turn, waits
from pipeline.ports import Job, Model, Record, Work

log = logging.getLogger(__name__)

STAGES = ("read", "compute", "refine", "write")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h

KEPT_CASES = 256
"""Cases whose files a worker keeps open: more than take turns, or each turn would open them."""


@dataclass(slots=True, eq=False)
class Begun:
    """A tile on its way through a worker."""

    tile: Tile
    came: float = field(default_factory=time.perf_counter)
    """In seconds of the clock that its turns are in."""

    loading_s: float = 0.0
    """How long it waited for its model to be loaded."""

    passed: Future[tuple[Any, list[Turn]]] = field(init=False)
    """Its record, and its turn in each stage."""


class TileWorker:
    """Runs tiles through read, compute, refine and write.

    With several begun, the other stages of other tiles run beside the device: the CRF holds
    Python's lock, the network's kernels do not. A model is loaded when the first tile needs it
    and kept for all cases that share it. A plain class, so that tests need no cluster.
    """

    def __init__(self) -> None:
        _keep_small_blocks()
        _ask_for_huge_pages()
        self._line = Line(*STAGES)
        self._models: dict[str, Any] = {}
        self._works: OrderedDict[tuple[str, str], Work] = OrderedDict()
        self._lock = threading.Lock()
        self._unloadable: Exception | None = None
        self.name = f"{socket.gethostname()}:{os.getpid()}"

    def run(self, job: Job) -> Record:
        """The record of a tile; raises as ``end``."""
        return self.end(self.begin(job))

    def begin(self, job: Job) -> Begun:
        """Send a tile through the stages, behind those that were begun before."""
        work, tile, begun = self._kept(job), job.tile, Begun(job.tile)

        def compute(data: Any) -> Any:
            model, begun.loading_s = self._loaded(work.model)
            return work.compute(model, tile, data)

        begun.passed = self._line.put(
            lambda _: work.read(tile),
            compute,
            lambda data: work.refine(tile, data),
            lambda result: work.write(tile, result),
        )
        return begun

    def end(self, begun: Begun) -> Record:
        """The record of a tile, once it has passed; a failed one where any stage raised.

        Raises what no other tile would fare better with: whatever loading the model raises,
        LeaseHeldError, what a full disk raises, and ExecutionError for a device that is lost.
        And CancelledError for a tile that was recalled before it was begun.
        """
        tile = begun.tile
        try:
            return self._record(begun)
        except CancelledError:
            raise
        except Exception as error:  # a bad tile is reported, the rest goes on
            if error is self._unloadable or isinstance(error, LeaseHeldError) or no_space(error):
                raise
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            if _device_lost(error):
                raise ExecutionError(
                    f"tile {tile.key.number} of {tile.key.case}: the device of {self.name} is"
                    f" lost to this process ({text}); run the same command again"
                ) from error
            log.info("tile %d: %s", tile.key.number, traceback.format_exc())
            return Record(key=tile.key, status="failed", worker=self.name, error=text)

    def recall(self) -> None:
        """Give back the tiles that were not begun: another worker has nothing to do."""
        self._line.recall()

    def close(self) -> None:
        """End the threads; what they hold is freed."""
        self._line.close()

    def _record(self, begun: Begun) -> Record:
        record: Record
        record, turns = begun.passed.result()
        seconds = {stage: turn.busy for stage, turn in zip(STAGES, turns, strict=True)}
        waited = waits(STAGES, turns, came=begun.came)
        if begun.loading_s:
            seconds["compute"] -= begun.loading_s
            waited["compute"] = waited.get("compute", {}) | {"model": begun.loading_s}
        return replace(
            record,
            worker=self.name,
            loads=len(self._models),
            seconds=seconds,
            waits=waited,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )

    def _loaded(self, recipe: Model) -> tuple[Any, float]:
        """The model, and the seconds it took to load it when it was asked for first.

        Called in the device's thread alone.
        """
        if recipe.key in self._models:
            return self._models[recipe.key], 0.0
        start = time.perf_counter()
        try:
            model = self._models[recipe.key] = recipe.load()
        except Exception as error:
            self._unloadable = error
            raise
        _give_back()
        return model, time.perf_counter() - start

    def _kept(self, job: Job) -> Work:
        """The instance that did earlier tiles of the case, whose files are open."""
        # The case as well: two files of equal content are equal work that is written apart.
        key = (job.tile.key.case, job.work.key)
        with self._lock:
            work = self._works.setdefault(key, job.work)
            self._works.move_to_end(key)
            if len(self._works) > KEPT_CASES:
                self._works.popitem(last=False)
            return work


def _device_lost(error: Exception) -> bool:
    """Whether the process's context on the device is broken: every later call would fail, too."""
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


def _keep_small_blocks() -> None:
    """Have glibc keep what windows use again and again, and return larger blocks when freed.

    A window of a deep network takes blocks of 1 to 17 MB. Returned each time, they come back as
    pages that must be cleared: ResNet-50 at 2048 px, two threads, 15.1 s, 4.2 s of them the
    kernel's, against 13.5 and 2.3 (measured). Of the largest, heaps would keep several.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 16 * 2**20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


def _give_back() -> None:
    """Have glibc return what reading a tile and loading a model left free between other blocks.

    Other threads' heaps among it, where windows would not find it.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _ask_for_huge_pages() -> None:
    """Have torch ask the kernel for pages of 2 MiB, before it allocates its first tensor.

    Blocks that are given back come back as pages that must be cleared one by one: a fifth of a
    deep network's time, half as much with huge pages (measured).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
