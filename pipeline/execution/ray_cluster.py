"""The Ray cluster that a run joins or starts."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import exceptions as rex

from pipeline.errors import ExecutionError

CONNECT_TIMEOUT_S = 10.0
OBJECT_STORE_BYTES = 100 * 2**20


class Node(NamedTuple):
    """What a living node of a cluster has."""

    cores: int
    gpus: int


def cluster_nodes(address: str) -> list[Node]:
    """The nodes of the cluster at ``address`` that can compute. Raises ExecutionError."""
    joined = ray.is_initialized()
    if not joined:
        _connect(address)
    try:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        if not joined:
            ray.shutdown()
    return [Node(int(has["CPU"]), int(has.get("GPU", 0))) for has in alive if has.get("CPU")]


@contextmanager
def cluster(address: str, *, cores: int, run_dir: Path) -> Iterator[None]:
    """Join or start a cluster from inside ``run_dir``; stop it if it was started here.

    One that is started has ``cores`` cores. Raises ExecutionError.
    """
    if ray.is_initialized():
        yield
        return
    before = Path.cwd()
    os.chdir(run_dir)
    with _stdout_kept():
        try:
            with _signals_kept():
                _connect(address, **(_new(cores) if address == "local" else {}))
            yield
        finally:
            os.chdir(before)
            ray.shutdown()


def _new(cores: int) -> dict[str, Any]:
    return {
        "num_cpus": cores,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
    }


def _connect(address: str, **options: Any) -> None:
    """Join or start the cluster. Raises ExecutionError."""
    if address.startswith("ray://"):
        raise ExecutionError(
            f"Ray client address {address} is not supported: actors must share storage with the"
            " driver; run the command on a node of the cluster"
        )
    try:
        # "auto" may be the address of a cluster that was killed, and says so nowhere.
        found = ray._private.services.canonicalize_bootstrap_address(address) or address
        host, _, port = found.rpartition(":")
        if port.isdecimal():
            # Ray would try for minutes.
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
        ray.init(address=found, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, ValueError, rex.AuthenticationError) as error:
        raise ExecutionError(
            f"Ray cluster {address} asked for: {str(error).splitlines()[0]}"
        ) from error


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """Ray prints the deaths of nodes to standard output, where a program reads our answer."""
    before = ray._private.worker._worker_logs_enabled
    ray._private.worker._worker_logs_enabled = False
    try:
        yield
    finally:
        ray._private.worker._worker_logs_enabled = before


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM; ours drains the run, so it is put back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
