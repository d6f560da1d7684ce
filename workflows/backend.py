"""Who runs the tiles: this process, or Ray actors here or on a cluster."""

from __future__ import annotations

from pathlib import Path

from pipeline.ports import Backend
from workflows.config import RunOptions, ray_address


def make_backend(
    options: RunOptions,
    *,
    device: str,
    threads: int,
    workers: int,
    run_dir: Path,
) -> Backend:
    """The backend asked for.

    Args:
        options: On which cluster.
        device: ``cpu`` or ``cuda``, of each worker.
        threads: Of each worker.
        workers: That the plan counts with. On a cluster that is joined they are as many as fit,
            unless a number was asked for.
        run_dir: Where actors prove that they share storage.

    Raises ExecutionError.
    """
    if options.backend == "serial":
        from pipeline.execution.serial import SerialBackend

        return SerialBackend()
    address = ray_address(options.ray_address)
    from pipeline.execution.ray_pool import RayBackend

    return RayBackend(
        run_dir=run_dir,
        workers=workers if address == "local" or options.workers is not None else None,
        threads=threads,
        gpus_per_worker=1 if device == "cuda" else 0,
        address=address,
    )
