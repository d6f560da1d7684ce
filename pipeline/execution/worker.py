"""One worker: three stages, each a thread that takes one tile at a time, so that tiles overlap."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import queue
import resource
import socket
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from pipeline.domain import Tile
from pipeline.errors import LeaseHeldError
from pipeline.ports import Record, Work

log = logging.getLogger(__name__)

T = TypeVar("T")
Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]

_M_MMAP_THRESHOLD = -3  # from malloc.h

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


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
    """Runs tiles through read, compute and write; called from one thread, or from several.

    Called from several, the reader and the writer of other tiles run beside the device. A plain
    class, so that tests need no cluster.
    """

    def __init__(self, work: Work) -> None:
        _give_back_large_blocks()
        self._reader, self._device, self._writer = Stage("read"), Stage("device"), Stage("write")
        self._work, _ = self._device.run(work.open)
        self.name = f"{socket.gethostname()}:{os.getpid()}"

    def run(self, tile: Tile) -> Record:
        """The record of a tile; a failed one where any stage raised.

        Raises LeaseHeldError, and what a full disk raises: no other tile would fare better.
        """
        try:
            return self._run(tile)
        except Exception as error:  # a bad tile is reported, the rest goes on
            if isinstance(error, LeaseHeldError) or _no_space(error):
                raise
            log.info("tile %d: %s", tile.key.number, traceback.format_exc())
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            return Record(key=tile.key, status="failed", worker=self.name, error=text)

    def close(self) -> None:
        """End the threads; what they hold is freed."""
        for stage in (self._reader, self._device, self._writer):
            stage.close()

    def _run(self, tile: Tile) -> Record:
        data, read_s = self._reader.run(self._work.read, tile)
        result, compute_s = self._device.run(self._work.compute, tile, data)
        del data
        record, write_s = self._writer.run(self._work.write, tile, result)
        return replace(
            record,
            worker=self.name,
            loads=self._work.loads,
            seconds={"read": read_s, "compute": compute_s, "write": write_s},
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )


def _no_space(error: Exception) -> bool:
    """Whether an adapter failed for want of space, be it for the mask or for an unpacked scan."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in NO_SPACE


def _give_back_large_blocks() -> None:
    """Have glibc return every block of 4 MiB or more when it is freed.

    Left alone it raises that bound to 32 MiB, keeps tile-sized blocks in heaps that fragment, and
    a worker grows with the number of tiles: 1.2 GB against 0.7 after 64 tiles (measured).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 4 * 2**20)
