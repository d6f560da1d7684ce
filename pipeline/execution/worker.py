"""One worker: three stages, each held by one tile at a time, so that tiles in flight overlap."""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
import threading
import time
import traceback
from dataclasses import replace

from pipeline.domain import Tile
from pipeline.errors import LeaseHeldError
from pipeline.ports import Record, Work

log = logging.getLogger(__name__)

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class TileWorker:
    """Runs tiles through read, compute and write; called from one thread, or from several.

    The reader and the writer of other tiles run beside the device because each stage has a lock
    of its own; a plain class, so that tests need no cluster.
    """

    def __init__(self, work: Work) -> None:
        self._work = work.open()
        self._reading, self._computing, self._writing = (threading.Lock() for _ in range(3))
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

    def _run(self, tile: Tile) -> Record:
        with self._reading:
            t0 = time.perf_counter()
            data = self._work.read(tile)
            t1 = time.perf_counter()
        with self._computing:
            t2 = time.perf_counter()
            result = self._work.compute(tile, data)
            t3 = time.perf_counter()
        del data
        with self._writing:
            t4 = time.perf_counter()
            record = self._work.write(tile, result)
            t5 = time.perf_counter()
        return replace(
            record,
            worker=self.name,
            loads=self._work.loads,
            seconds={"read": t1 - t0, "compute": t3 - t2, "write": t5 - t4},
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )


def _no_space(error: Exception) -> bool:
    """Whether an adapter failed for want of space, be it for the mask or for an unpacked scan."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in NO_SPACE
