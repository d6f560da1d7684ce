"""Tiles on Ray actors: one actor per device, descriptors in, small records out.

The only module of execution that imports Ray. Retries live here, not in Ray: an actor that dies is
dropped, its tiles go back into the queue, a new actor takes its place.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import exceptions as rex

from pipeline.domain import Tile
from pipeline.errors import ExecutionError
from pipeline.execution.identity import package_digest
from pipeline.execution.queue import TileQueue
from pipeline.execution.worker import TileWorker
from pipeline.ports import Record, Work

log = logging.getLogger(__name__)

# The last three are not subclasses of RayActorError.
DEATHS = (rex.RayActorError, rex.NodeDiedError, rex.WorkerCrashedError, rex.OutOfMemoryError)
IN_FLIGHT = 2
START_TIMEOUT_S = 300.0
OBJECT_STORE_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class RayBackend:
    """Runs tiles on ``workers`` actors; joins the cluster at ``address`` or starts one here."""

    run_dir: Path
    """Shared with every actor; the process enters it before the cluster starts."""

    workers: int
    gpus_per_worker: int = 0
    """1 for CUDA, 0 for CPU."""

    address: str = "local"
    """``local`` starts a cluster; ``auto`` or host:port joins one."""

    def __post_init__(self) -> None:
        if self.address.startswith("ray://"):
            raise ExecutionError(
                f"Ray client address {self.address} is not supported: actors must share storage"
                " with the driver; run the command on a node of the cluster"
            )
        if self.workers < 1:
            raise ExecutionError(f"at least one worker is needed, got {self.workers}")

    def run(
        self, work: Work, tiles: Iterable[Tile], *, stop: Callable[[], bool]
    ) -> Iterator[Record]:
        """Yield a record per tile as they end. Raises ExecutionError when no worker can live."""
        with _cluster(self, threads=work.threads):
            pool = _Pool(self, work, TileQueue(tiles))
            try:
                yield from pool.records(stop)
            finally:
                pool.close()


class _Actor:
    """What Ray starts: a TileWorker that first proves where it stands."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._worker: TileWorker | None = None

    def start(self, nonce: Path) -> tuple[str, str, str]:
        """Load the model; return process name, package digest and the nonce as read here."""
        text = nonce.read_text() if nonce.exists() else ""
        answer = nonce.with_name(f"{nonce.name}.{os.getpid()}")
        if text:
            answer.write_text(text)
        self._worker = TileWorker(self._work)
        return self._worker.name, package_digest(), answer.name

    def run(self, tile: Tile) -> Record:
        assert self._worker is not None
        return self._worker.run(tile)


@dataclass(slots=True, eq=False)
class _Member:
    """An actor of the pool and the tiles it holds, by the reference of their record."""

    handle: Any
    starting: Any
    tiles: dict[Any, Tile] = field(default_factory=dict)
    exclusive: bool = False
    ready: bool = False

    @property
    def free(self) -> bool:
        return self.ready and not self.exclusive and len(self.tiles) < IN_FLIGHT


class _Pool:
    def __init__(self, backend: RayBackend, work: Work, queue: TileQueue) -> None:
        self._backend, self._queue = backend, queue
        self._work = ray.put(work)
        self._digest = package_digest()
        self._nonce = backend.run_dir / f"nonce-{secrets.token_hex(8)}"
        self._nonce.write_text(secrets.token_hex(16))
        self._class = ray.remote(_Actor).options(
            num_cpus=work.threads,
            num_gpus=backend.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=IN_FLIGHT + 1,
        )
        self._deaths = 0
        self._members = [self._member() for _ in range(backend.workers)]

    def records(self, stop: Callable[[], bool]) -> Iterator[Record]:
        """Keep every actor fed until the queue is empty or ``stop``; yield final records."""
        progress = time.monotonic()
        while True:
            if not stop():
                self._feed()
            waiting = {ref: m for m in self._members for ref in m.tiles}
            if not waiting and (stop() or self._queue.empty):
                return
            for member in self._members:
                if not member.ready:
                    waiting[member.starting] = member
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=1.0, fetch_local=False)
            for ref in done:
                progress = time.monotonic()
                yield from self._settle(waiting[ref], ref)
            if not any(m.ready for m in self._members):
                self._check_start(time.monotonic() - progress)

    def _feed(self) -> None:
        for _ in range(IN_FLIGHT):
            for member in self._members:
                if not member.free:
                    continue
                tile = self._queue.take(alone=not member.tiles)
                if tile is not None:
                    member.exclusive = self._queue.is_suspect(tile)
                    member.tiles[member.handle.run.remote(tile)] = tile

    def _settle(self, member: _Member, ref: Any) -> Iterator[Record]:
        try:
            answer = ray.get(ref)
        except DEATHS as error:
            yield from self._bury(member, error)
            return
        except rex.RayTaskError as error:
            raise error.cause from error
        if not member.ready:
            self._admit(member, answer)
            return
        self._deaths = 0
        member.exclusive = False
        record = self._queue.settle(member.tiles.pop(ref), answer)
        if record is not None:
            yield record

    def _bury(self, member: _Member, error: Exception) -> Iterator[Record]:
        """Drop a dead actor, return its tiles to the queue, start another in its place."""
        self._deaths += 1
        self._members.remove(member)
        text = f"the worker died {type(error).__name__}: {error}".splitlines()[0]
        log.warning("%s; %d tiles go back into the queue", text, len(member.tiles))
        for tile in member.tiles.values():
            record = self._queue.died(tile, error=text)
            if record is not None:
                yield record
        if self._deaths >= max(12, 6 * self._backend.workers):
            raise ExecutionError(f"{self._deaths} workers died in a row, the last one: {text}")
        self._members.append(self._member())

    def _member(self) -> _Member:
        handle = self._class.remote(self._work)
        return _Member(handle, handle.start.remote(self._nonce))

    def _admit(self, member: _Member, answer: tuple[str, str, str]) -> None:
        name, digest, file = answer
        if digest != self._digest:
            raise ExecutionError(
                f"worker {name} runs other code than the driver: install the same terravox there"
            )
        proof = self._nonce.with_name(file)
        if not proof.exists() or proof.read_text() != self._nonce.read_text():
            raise ExecutionError(
                f"worker {name} does not share {self._backend.run_dir} with the driver:"
                " put --run-dir on storage that every node mounts"
            )
        member.ready = True

    def _check_start(self, silent_s: float) -> None:
        if silent_s > START_TIMEOUT_S:
            raise ExecutionError(
                f"no worker started within {START_TIMEOUT_S:.0f} s: asked for"
                f" {self._backend.workers}, the cluster has {ray.available_resources()} free"
            )

    def close(self) -> None:
        for member in self._members:
            ray.kill(member.handle)
        for path in self._nonce.parent.glob(f"{self._nonce.name}*"):
            path.unlink(missing_ok=True)


@contextmanager
def _cluster(backend: RayBackend, *, threads: int) -> Iterator[None]:
    """Join or start a cluster from inside the run directory; stop it if it was started here."""
    if ray.is_initialized():
        yield
        return
    local = backend.address == "local"
    options: dict[str, Any] = {}
    if local:
        options = {
            "num_cpus": backend.workers * threads,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    before = Path.cwd()
    os.chdir(backend.run_dir)
    try:
        with _signals_kept():
            ray.init(
                address=backend.address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
        yield
    finally:
        os.chdir(before)
        ray.shutdown()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM; ours drains the run, so it is put back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
