"""Where the workers will run: this machine, or a cluster that is joined."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from workflows.config import RunOptions, ray_address


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """Where the workers will run."""

    cores: int
    """Of this machine; of the smallest node of a cluster that is joined."""

    all_cores: int
    """Of this machine, or of all nodes."""

    gpus: int
    """Of this machine, or of all nodes there are now: an autoscaler may add some."""

    memory_bytes: int
    """Of this machine, or what its cgroup may use."""

    gpu_bytes: int | None
    """Of the smallest GPU that torch sees here; None where it sees none."""

    here: bool
    """False on a cluster that is joined."""


def workplace(options: RunOptions) -> Workplace:
    """What there is to plan for. Raises ExecutionError for a cluster that cannot be joined."""
    address = "local" if options.backend == "serial" else ray_address(options.ray_address)
    return _workplace(address)


@functools.cache
def _workplace(address: str) -> Workplace:
    """Looked up once a command."""
    import torch

    if address == "local":
        cores, gpus = usable_cores(), torch.cuda.device_count()
        return Workplace(
            cores=cores,
            all_cores=cores,
            gpus=gpus,
            memory_bytes=usable_memory(),
            gpu_bytes=_gpu_bytes(),
            here=True,
        )
    from pipeline.execution.ray_cluster import cluster_nodes

    nodes = cluster_nodes(address)
    return Workplace(
        cores=min((node.cores for node in nodes), default=1),
        all_cores=sum(node.cores for node in nodes),
        gpus=sum(node.gpus for node in nodes),
        memory_bytes=usable_memory(),
        gpu_bytes=_gpu_bytes(),
        here=False,
    )


def usable_memory() -> int:
    """Bytes that this process may use: the machine's, or its share by cgroup v2."""
    total = psutil.virtual_memory().total
    try:
        most = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return total if most == "max" else min(total, int(most))


def _gpu_bytes() -> int | None:
    import torch

    devices = range(torch.cuda.device_count())
    return min((torch.cuda.get_device_properties(n).total_memory for n in devices), default=None)


def usable_cores() -> int:
    """Processor cores that this process may use: its affinity, and its share by cgroup v2."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def workers(options: RunOptions, *, device: str, threads: int) -> int:
    """Number of actors: as asked, else one per CUDA device or per share of the cores.

    On a cluster this is what a plan counts with; the pool grows with the cluster.
    """
    if options.backend == "serial":
        return 1
    return options.workers or usual_workers(workplace(options), device=device, threads=threads)


def usual_workers(place: Workplace, *, device: str, threads: int) -> int:
    """One per CUDA device, or per share of the cores."""
    return max(1, place.gpus if device == "cuda" else place.all_cores // threads)
