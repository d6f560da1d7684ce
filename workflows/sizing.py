"""How large a tile is, and what it will take: bytes of memory and of storage."""

from __future__ import annotations

import math
from collections.abc import Iterable

import psutil

from pipeline.domain import Pass, Region, Shape
from pipeline.errors import PlanError
from pipeline.inference.memory import activation_bytes
from pipeline.inference.scene_context import sums_layout
from pipeline.models.bundle import Bundle
from pipeline.models.deeplab import aspp_width

AUTO_TILES = {2: (512, 1024, 2048, 4096), 3: (64, 96, 128, 192, 256)}
"""Sides that ``auto`` chooses from, in pixels, by number of axes."""

MODEST_RATIO = {2: 1.35, 3: 2.0}
"""Halo work that ``auto`` puts up with, over the scene's own, by number of axes."""

DRIVER_BYTES = 850 * 2**20
WORKER_BYTES = 650 * 2**20
"""What the processes hold beside their tiles: torch, GDAL, Ray, MLflow (measured, PSS)."""


def asked_tile(side: int, *, shape: Shape, stride: int) -> Shape:
    """A square tile, no longer than the padded scene on any axis. Raises PlanError."""
    if side % stride:
        raise PlanError(f"--tile {side}: must be a multiple of the output stride, {stride} px")
    return tuple(min(side, -(-n // stride) * stride) for n in shape)


def modest(sweeps: Iterable[Pass], bundle: Bundle) -> Pass:
    """The first sweep, of growing tiles, with modest halo work; else the last that fits memory.

    A worker's tile may take a quarter of this machine's memory.
    """
    best: Pass | None = None
    for sweep in sweeps:
        if best is not None and _tile_bytes(bundle, sweep) > psutil.virtual_memory().total // 4:
            break
        best = sweep
        if sweep.halo_work_ratio <= MODEST_RATIO[len(sweep.grid.shape)]:
            break
    assert best is not None
    return best


def peak_bytes(bundle: Bundle, sweep: Pass, *, workers: int, with_crf: bool) -> int:
    """Predicted peak memory of driver and workers together."""
    tile = _tile_bytes(bundle, sweep)
    if with_crf:
        # pydensecrf on top of its inputs, per pixel; measured at 2 to 21 classes.
        tile += _middle_read(sweep).size * (300 + 50 * len(bundle.classes))
    return DRIVER_BYTES + min(workers, len(sweep)) * (WORKER_BYTES + tile)


def too_large(peak: int) -> tuple[str, ...]:
    """A note where the predicted peak is more than this machine has."""
    total = psutil.virtual_memory().total
    if peak <= total:
        return ()
    note = f"the plan takes {peak / 1e9:.1f} GB, this machine has {total / 1e9:.1f} GB"
    return (f"{note}: give fewer --workers or a smaller --tile",)


def store_bytes(bundle: Bundle, sweep: Pass, *, scores: str) -> int:
    """Uncompressed bytes of mask, scores when asked for, and the sums of a context pass."""
    score_size = {"none": 0, "uint8": 1, "float16": 2}[scores]
    mask_size = 1 if bundle.mask_dtype == "uint8" else 2
    sums = 0
    if len(sweep.with_context()) > 1:
        shape, _ = sums_layout(sweep.grid, aspp_width(bundle.architecture))
        sums = 8 * math.prod(shape)
    return math.prod(sweep.grid.shape) * (mask_size + score_size * len(bundle.classes)) + sums


def _tile_bytes(bundle: Bundle, sweep: Pass) -> int:
    return activation_bytes(bundle, _middle_read(sweep).shape)


def _middle_read(sweep: Pass) -> Region:
    """What the tile in the middle of the scene reads: no tile reads more."""
    number = 0
    for count in sweep.grid.counts:
        number = number * count + count // 2
    return sweep.tile(number).read
