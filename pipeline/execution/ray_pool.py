"""Tiles on Ray actors: one actor per device, descriptors in, small records out.

Retries live here, not in Ray: an actor that dies is dropped, its tiles go back into the queue, and
a new actor takes its place where there is room.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import exceptions as rex

from pipeline.domain import TileKey
from pipeline.errors import ExecutionError
from pipeline.execution.actor import Answer, TileActor
from pipeline.execution.identity import package_digest
from pipeline.execution.queue import TileQueue
from pipeline.execution.ray_cluster import cluster
from pipeline.ports import Feed, Job, Record

log = logging.getLogger(__name__)

# The last three are not subclasses of RayActorError.
DEATHS = (rex.RayActorError, rex.NodeDiedError, rex.WorkerCrashedError, rex.OutOfMemoryError)
IN_FLIGHT, QUICK_IN_FLIGHT, QUICK_S = 3, 12, 0.01
"""Tiles that an actor holds: one is read, one on the device, one refined or written. More of those
that take fewer seconds than QUICK_S: the way to the actor and back takes as long."""
START_TIMEOUT_S, JOIN_TIMEOUT_S = 300.0, 1800.0
"""How long no worker may live: here, and where a node may have to be made first."""
RECOUNT_S = 3.0
"""How often the nodes are counted, in seconds."""
HUNGRY_S, FED_S = 0.1, 1.0
"""How long is waited for an answer while actors could take more from the feed, and else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayBackend:
    """Runs tiles on ``workers`` actors; joins the cluster at ``address`` or starts one here."""

    run_dir: Path
    """Shared with every actor; the process enters it before the cluster starts."""

    workers: int | None
    """None: as many as fit on the nodes there are, counted again and again; never more, so that an
    autoscaler starts more than one node for a number alone."""

    threads: int
    """Cores that an actor takes."""

    gpus_per_worker: int = 0
    """1 for CUDA, 0 for CPU."""

    address: str = "local"
    """``local`` starts a cluster; ``auto`` or host:port joins one."""

    def __post_init__(self) -> None:
        if self.threads < 1 or (self.workers is not None and self.workers < 1):
            raise ExecutionError(
                f"at least one worker of one thread is needed, got {self.workers} of {self.threads}"
            )

    def run(self, feed: Feed, *, stop: Callable[[], bool]) -> Iterator[Record]:
        """Yield a record per tile as they end.

        Raises ExecutionError when no worker can live, and what ``TileWorker.run`` raises.
        """
        workers = self.workers or max(1, len(os.sched_getaffinity(0)) // self.threads)
        with cluster(self.address, cores=workers * self.threads, run_dir=self.run_dir):
            pool = _Pool(self, feed)
            try:
                yield from pool.records(stop)
            finally:
                pool.close()

    def fits(self) -> int:
        """Actors that the nodes of the cluster could hold, were they empty; at least 1."""
        count = 0
        for has in (node["Resources"] if node["Alive"] else {} for node in ray.nodes()):
            shares = [has.get("CPU", 0) // self.threads]
            if self.gpus_per_worker:
                shares.append(has.get("GPU", 0) // self.gpus_per_worker)
            count += int(min(shares))
        return max(count, 1)


@dataclass(slots=True, eq=False)
class _Member:
    """An actor of the pool and the jobs it holds."""

    handle: Any
    calls: set[Any]
    """References of its answers: to its start, then to exchanges."""

    name: str = ""
    jobs: dict[TileKey, Job] = field(default_factory=dict)
    parcel: list[Job] = field(default_factory=list)
    """Of its jobs, those that the next exchange takes along."""

    exclusive: bool = False
    ready: bool = False
    recalled: bool = False
    room: int = IN_FLIGHT

    @property
    def free(self) -> bool:
        return self.ready and not self.exclusive and len(self.jobs) < self.room


class _Pool:
    def __init__(self, backend: RayBackend, feed: Feed) -> None:
        self._backend, self._feed, self._queue = backend, feed, TileQueue(feed)
        self._digest = package_digest()
        self._nonce = backend.run_dir / f"nonce-{secrets.token_hex(8)}"
        self._nonce.write_text(secrets.token_hex(16))
        self._class = ray.remote(TileActor).options(
            num_cpus=backend.threads,
            num_gpus=backend.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=3,  # an exchange, the one that takes its place, and a recall
            scheduling_strategy="SPREAD",
        )
        self._members: list[_Member] = []
        self._wanted = self._largest = self._deaths = 0
        self._counted = float("-inf")
        self._alive = self._complete = time.monotonic()

    def records(self, stop: Callable[[], bool]) -> Iterator[Record]:
        """Keep every actor fed until nothing is left or ``stop``; yield final records."""
        while True:
            stopping = stop()
            if not stopping:
                self._resize()
                self._hand_out()
            self._exchange()
            busy = [m for m in self._members if m.jobs]
            if not busy and (stopping or self._queue.empty):
                return
            starting = [m for m in self._members if not m.ready]
            waiting = {ref: member for member in busy + starting for ref in member.calls}
            for ref in self._answers(list(waiting)):
                if waiting[ref] in self._members:  # a death takes the actor's other answers along
                    yield from self._settle(waiting[ref], ref)
            self._check_alive()

    def _resize(self) -> None:
        """Start the actors that are wanted; let go of those that have nothing left to do."""
        if self._queue.empty:
            self._level()
            return
        if time.monotonic() - self._counted > RECOUNT_S:
            self._wanted = self._backend.workers or self._backend.fits()
            self._counted = time.monotonic()
        wanted = self._wanted
        if self._feed.ended:
            wanted = min(wanted, sum(1 for m in self._members if m.jobs) + self._queue.held)
        youngest = [m for m in reversed(self._members) if not m.ready]
        for member in youngest[: max(0, len(self._members) - wanted)]:
            self._drop(member)
        while len(self._members) < wanted:
            handle = self._class.remote()
            self._members.append(_Member(handle, {handle.start.remote(self._nonce)}))
        self._largest = max(self._largest, len(self._members))

    def _level(self) -> None:
        """What waits in an actor goes to one that is idle; where nothing waits, that is let go."""
        idle = [m for m in self._members if not m.jobs]
        crowded = [m for m in self._members if len(m.jobs) >= IN_FLIGHT]
        if any(m.ready for m in idle) and crowded:
            for member in [m for m in crowded if not m.recalled]:
                member.recalled = True
                member.handle.recall.remote()
            return
        for member in idle:
            self._drop(member)

    def _hand_out(self) -> None:
        free = [m for m in self._members if m.free]
        while free:
            member = min(free, key=lambda m: len(m.jobs))
            if job := self._queue.take(member.name, alone=not member.jobs):
                member.exclusive, member.recalled = self._queue.is_suspect(job), False
                member.jobs[job.tile.key] = job
                member.parcel.append(job)
            if job is None or not member.free:  # what there is may be for others
                free.remove(member)

    def _exchange(self) -> None:
        """Send what was handed out; wait with every actor that holds something."""
        for member in self._members:
            if member.parcel or (member.jobs and not member.calls):
                member.calls.add(member.handle.exchange.remote(tuple(member.parcel)))
                member.parcel.clear()

    def _answers(self, refs: list[Any]) -> list[Any]:
        """All references that are ready, once one is or the feed should be asked again."""
        hungry = not self._feed.ended and any(m.free for m in self._members)
        timeout_s = HUNGRY_S if hungry else FED_S
        if not refs:
            self._feed.wait(timeout_s)
            return []
        done, _ = ray.wait(refs, num_returns=1, timeout=timeout_s, fetch_local=False)
        if done:  # with many actors several are: a round for each would grow with their number
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        return list(done)

    def _settle(self, member: _Member, ref: Any) -> Iterator[Record]:
        member.calls.remove(ref)
        try:
            answers = ray.get(ref)
        except DEATHS as error:
            yield from self._bury(member, f"{type(error).__name__}: {error}")
            return
        except rex.RayTaskError as error:
            if not isinstance(error.cause, ExecutionError):
                raise error.cause from error
            yield from self._bury(member, str(error.cause))
            return
        if not member.ready:
            self._admit(member, answers)
            return
        for answer in answers:
            if record := self._note(member, answer):
                yield record

    def _note(self, member: _Member, answer: Answer) -> Record | None:
        """The record if it is final."""
        key, record = answer
        self._deaths = 0
        member.exclusive = False
        quick = record is not None and 0 < sum(record.seconds.values()) < QUICK_S
        member.room = QUICK_IN_FLIGHT if quick else IN_FLIGHT
        return self._queue.settle(member.jobs.pop(key), record)

    def _bury(self, member: _Member, why: str) -> Iterator[Record]:
        """Drop a dead actor and return its tiles to the queue."""
        self._deaths += 1
        self._drop(member)
        text = f"the worker died {why}".splitlines()[0]
        log.warning("%s; %d tiles go back into the queue", text, len(member.jobs))
        for job in member.jobs.values():
            if record := self._queue.died(job, error=text):
                yield record
        # A node that leaves takes its actors along all at once.
        if self._deaths >= max(12, 6 * self._largest):
            raise ExecutionError(f"{self._deaths} workers died in a row, the last one: {text}")

    def _drop(self, member: _Member) -> None:
        """Take an actor out of the pool, and end it: one that seems dead may be out of reach."""
        self._members.remove(member)
        self._feed.lost(member.name)
        ray.kill(member.handle)

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
        member.ready, member.name = True, name

    def _check_alive(self) -> None:
        """Raise ExecutionError when no actor lives for long; warn once when some cannot start."""
        now, ready = time.monotonic(), sum(1 for m in self._members if m.ready)
        if ready:
            self._alive = now
        if ready == len(self._members):
            self._complete = now
        asked = f"asked for {self._wanted} of {self._backend.threads} threads"
        if self._backend.gpus_per_worker:
            asked += f" and {self._backend.gpus_per_worker} GPU"
        patience = START_TIMEOUT_S if self._backend.address == "local" else JOIN_TIMEOUT_S
        if now - self._alive > patience:
            raise ExecutionError(
                f"no worker started within {patience:.0f} s: {asked},"
                f" the cluster has {ray.available_resources()} free"
            )
        if now - self._complete > patience:
            log.warning("only %d workers found room, %s; they do all the work", ready, asked)
            self._complete = float("inf")

    def close(self) -> None:
        """End every actor; leave no proof behind."""
        for member in list(self._members):
            self._drop(member)
        for path in self._nonce.parent.glob(f"{self._nonce.name}*"):
            path.unlink(missing_ok=True)
