"""Who runs the tiles: this process, or Ray actors here or on a cluster."""

from __future__ import annotations

from pathlib import Path

from pipeline.ports import Backend
from workflows.config import RunOptions, ray_address
from workflows.workplace import workers


def make_backend(
    options: RunOptions,
    *,
    device: str,
    threads: int,
    run_dir: Path,
    most: int | None = None,
) -> Backend:
    """The backend asked for.

    Args:
        options: How many workers, and on which cluster.
        device: ``cpu`` or ``cuda``, of each worker.
        threads: Of each worker.
        run_dir: Where actors prove that they share storage.
        most: More workers than that would find nothing to do.

    Raises ExecutionError.
    """
    if options.backend == "serial":
        from pipeline.execution.serial import SerialBackend

        return SerialBackend()
    address, count = ray_address(options.ray_address), options.workers
    if address == "local":
        count = workers(options, device=device, threads=threads)
    from pipeline.execution.ray_pool import RayBackend

    return RayBackend(
        run_dir=run_dir,
        workers=count if count is None or most is None else min(count, most),
        threads=threads,
        gpus_per_worker=1 if device == "cuda" else 0,
        address=address,
    )
