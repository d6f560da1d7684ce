"""How large a tile is, and what it will take: bytes of memory and of storage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import psutil

from pipeline.domain import Pass, Region, Shape
from pipeline.errors import PlanError
from pipeline.inference.canonical import CANONICAL_PX
from pipeline.inference.memory import activation_bytes
from pipeline.models.bundle import Bundle
from workflows.config import SegmentOptions

AUTO_TILES = {2: (512, 1024, 2048, 4096), 3: (64, 96, 128, 192, 256)}
"""Sides that ``auto`` chooses from, in pixels, by number of axes."""

MODEST_RATIO = {2: 1.35, 3: 2.0}
"""Halo work that ``auto`` puts up with, over the scene's own, by number of axes."""

DRIVER_BYTES = 850 * 2**20
WORKER_BYTES = 650 * 2**20
"""What the processes hold beside their tiles: torch, GDAL, Ray, MLflow (measured, PSS)."""


def canonical_side(options: SegmentOptions, bundle: Bundle) -> int | None:
    """Side of canonical windows, in pixels; None where windows are rows of the tile.

    Raises PlanError where the tile would decide the bytes for another reason.
    """
    if options.windows == "rows":
        return None
    if options.halo != "exact":
        raise PlanError(
            f"--windows canonical makes bytes that do not depend on the tile, --halo {options.halo}"
            " those that do: leave out one of them"
        )
    if options.context == "tile" and bundle.architecture.image_pooling:
        raise PlanError(
            "--windows canonical makes bytes that do not depend on the tile, --context tile"
            " those that do: leave out one of them"
        )
    return CANONICAL_PX[bundle.architecture.dims]


def tile_choices(
    side: int | None, shape: Shape, *, stride: int, canonical_px: int | None
) -> Iterator[Shape]:
    """Square tiles, no longer than the padded scene on any axis: of ``side``, or growing ones.

    Raises PlanError for a side that is no whole number of strides, and of canonical windows.
    """
    for asked in AUTO_TILES[len(shape)] if side is None else (side,):
        if asked % stride:
            raise PlanError(f"--tile {asked}: must be a multiple of the output stride, {stride} px")
        if canonical_px is not None and asked % canonical_px:
            raise PlanError(
                f"--tile {asked}: must be a multiple of the canonical window, {canonical_px} px"
            )
        yield tuple(min(asked, -(-n // stride) * stride) for n in shape)


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


def store_bytes(bundle: Bundle, shape: Shape, *, scores: str) -> int:
    """Uncompressed bytes of the mask, and of the scores when they are asked for."""
    score_size = {"none": 0, "uint8": 1, "float16": 2}[scores]
    mask_size = 1 if bundle.mask_dtype == "uint8" else 2
    return math.prod(shape) * (mask_size + score_size * len(bundle.classes))


def _tile_bytes(bundle: Bundle, sweep: Pass) -> int:
    return activation_bytes(bundle, _middle_read(sweep).shape)


def _middle_read(sweep: Pass) -> Region:
    """What the tile in the middle of the scene reads: no tile reads more."""
    number = 0
    for count in sweep.grid.counts:
        number = number * count + count // 2
    return sweep.tile(number).read
