"""One worker: four stages, each a thread that takes one tile at a time, so that tiles overlap."""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import resource
import socket
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from pipeline.domain import Tile
from pipeline.errors import ExecutionError, LeaseHeldError, no_space
from pipeline.ports import Job, Model, Record, Work

log = logging.getLogger(__name__)

T = TypeVar("T")
Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]

_M_MMAP_THRESHOLD = -3  # from malloc.h

KEPT_CASES = 256
"""Cases whose files a worker keeps open: more than take turns, or each turn would open them."""


class Stage:
    """A thread that runs one call after another.

    A thread of its own, not a lock: the C library keeps a heap for each thread, and a device whose
    tiles wander over threads holds its working memory several times (1.5 GB against 1.0, measured).
    """

    def __init__(self, name: str) -> None:
        self._inbox: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        # Daemon: a worker that Ray ends must not wait for it.
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def run(self, function: Callable[..., T], *args: Any) -> tuple[T, float]:
        """Call in the stage's thread, after what was asked before; the answer and its seconds."""
        future: Future[tuple[T, float]] = Future()
        self._inbox.put((future, function, args))
        return future.result()

    def close(self) -> None:
        """End the thread once it has answered what it was asked."""
        self._inbox.put(None)

    def _serve(self) -> None:
        while (call := self._inbox.get()) is not None:
            future, function, args = call
            start = time.perf_counter()
            try:
                future.set_result((function(*args), time.perf_counter() - start))
            except BaseException as error:  # noqa: BLE001  it is raised where the call was made
                future.set_exception(error)
            del call, future, function, args  # or the tile stays until the next one comes


class TileWorker:
    """Runs tiles through read, compute, refine and write; called from one thread or several.

    Called from several, the other stages of other tiles run beside the device: the CRF holds
    Python's lock, the network's kernels do not. A model is loaded when the first tile needs it
    and kept for all cases that share it. A plain class, so that tests need no cluster.
    """

    def __init__(self) -> None:
        _give_back_large_blocks()
        self._reader, self._device = Stage("read"), Stage("device")
        self._refiner, self._writer = Stage("refine"), Stage("write")
        self._models: dict[str, Any] = {}
        self._works: OrderedDict[tuple[str, str], Work] = OrderedDict()
        self._lock = threading.Lock()
        self._unloadable: Exception | None = None
        self.name = f"{socket.gethostname()}:{os.getpid()}"

    def run(self, job: Job) -> Record:
        """The record of a tile; a failed one where any stage raised.

        Raises what no other tile would fare better with: whatever loading the model raises,
        LeaseHeldError, what a full disk raises, and ExecutionError for a device that is lost.
        """
        tile = job.tile
        try:
            return self._run(self._kept(job), tile)
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

    def close(self) -> None:
        """End the threads; what they hold is freed."""
        for stage in (self._reader, self._device, self._refiner, self._writer):
            stage.close()

    def _run(self, work: Work, tile: Tile) -> Record:
        data, read_s = self._reader.run(work.read, tile)
        model, _ = self._device.run(self._loaded, work.model)
        data, compute_s = self._device.run(work.compute, model, tile, data)
        result, refine_s = self._refiner.run(work.refine, tile, data)
        del data
        record, write_s = self._writer.run(work.write, tile, result)
        return replace(
            record,
            worker=self.name,
            loads=len(self._models),
            seconds={"read": read_s, "compute": compute_s, "refine": refine_s, "write": write_s},
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )

    def _loaded(self, recipe: Model) -> Any:
        """The model, loaded when it is asked for first; called in the device thread alone."""
        if recipe.key not in self._models:
            try:
                self._models[recipe.key] = recipe.load()
            except Exception as error:
                self._unloadable = error
                raise
        return self._models[recipe.key]

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


def _give_back_large_blocks() -> None:
    """Have glibc return every block of 4 MiB or more when it is freed.

    Left alone it raises that bound to 32 MiB, keeps tile-sized blocks in heaps that fragment, and
    a worker grows with the number of tiles: 1.2 GB against 0.7 after 64 tiles (measured).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 4 * 2**20)
