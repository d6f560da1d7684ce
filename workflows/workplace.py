"""Where the workers will run: this machine, or a cluster that is joined."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from workflows.config import SegmentOptions, ray_address


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """Where the workers will run."""

    cores: int
    """Of this machine; of the smallest node of a cluster that is joined."""

    all_cores: int
    """Of this machine, or of all nodes."""

    gpus: int
    """Of this machine, or of all nodes there are now: an autoscaler may add some."""

    here: bool
    """False on a cluster that is joined."""


def workplace(options: SegmentOptions) -> Workplace:
    """What there is to plan for. Raises ExecutionError for a cluster that cannot be joined."""
    address = "local" if options.backend == "serial" else ray_address(options.ray_address)
    return _workplace(address)


@functools.cache
def _workplace(address: str) -> Workplace:
    """Looked up once a command."""
    if address == "local":
        cores, gpus = usable_cores(), torch.cuda.device_count()
        return Workplace(cores=cores, all_cores=cores, gpus=gpus, here=True)
    from pipeline.execution.ray_pool import cluster_nodes

    nodes = cluster_nodes(address)
    return Workplace(
        cores=min((node.cores for node in nodes), default=1),
        all_cores=sum(node.cores for node in nodes),
        gpus=sum(node.gpus for node in nodes),
        here=False,
    )


def usable_cores() -> int:
    """Processor cores that this process may use: its affinity, and its share by cgroup v2."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def workers(options: SegmentOptions, *, device: str, threads: int) -> int:
    """Number of actors: as asked, else one per CUDA device or per share of the cores.

    On a cluster this is what a plan counts with; the pool grows with the cluster.
    """
    if options.backend == "serial":
        return 1
    if options.workers is not None:
        return options.workers
    place = workplace(options)
    return max(1, place.gpus if device == "cuda" else place.all_cores // threads)
