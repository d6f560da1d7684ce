"""What a CRF will take of memory, from the vertices that its image has: arithmetic, no arrays.

N pixels; of each kernel D features, V = D + 1 vertices of a pixel's simplex, M vertices in all. The
terms are the arrays of each engine at the moment when most of them are alive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.crf.density import MARGIN, Density
from pipeline.crf.native_engine import MOST_KEPT_BYTES
from pipeline.crf.params import ResolvedCrf
from pipeline.domain import Shape

_PART = 32768
"""Pixels that the native engine numbers together: PART in lattice.hpp."""

_HUGE_PAGE_BYTES = 2**21
"""To which the native engine's arrays are rounded up."""

_FREED_BYTES = 256 * 2**20
"""Of torch's blocks below 32 MiB that were freed, and stay with the process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrfMemory:
    """Most bytes that are taken at a time, on top of probabilities and guide."""

    host: int
    """By what an engine is given, and by what it answers."""

    engine: int
    """By the engine, where it computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """A kernel over the pixels of a tile."""

    pixels: int
    corners: int
    """V."""

    vertices: float
    touched: float
    """Vertices, one counted for each part of the pixels that touches it."""


def crf_memory(shape: Shape, crf: ResolvedCrf, density: Density, *, classes: int) -> CrfMemory:
    """Of a mean field over so many pixels by ``crf.engine``, which is one by name.

    Small images in one call take as much as one of as many pixels.

    ``density``: of the kernels of ``crf`` over the image.
    """
    pixels = math.prod(shape)
    rows = _PART // math.prod(shape[1:])
    loads = []
    for number, kernel in enumerate(crf.kernels):
        corners = len(kernel.greatest(shape)) + 1
        most = corners * pixels
        loads.append(
            _Load(
                pixels=pixels,
                corners=corners,
                vertices=min(most, MARGIN * pixels * density.vertices(number)),
                touched=min(most, MARGIN * pixels * density.touched(number, rows=rows)),
            )
        )
    features = 4 * sum(load.corners - 1 for load in loads)
    matrix = crf.compatibility is not None
    taken = {"native": _native, "torch": _torch, "pydensecrf": _pydensecrf}[crf.engine]
    # Probabilities that are refined in a copy, energies, what is found.
    host = pixels * (3 * 4 * classes + features)
    engine = MOST_KEPT_BYTES + taken(loads, classes=classes, matrix=matrix)
    return CrfMemory(host=host, engine=int(engine))


def _native(loads: Sequence[_Load], *, classes: int, matrix: bool) -> float:
    """Plans, each with tables by which vertices are found; then all with their rows."""
    width, held, most = _width(classes - 1), 0.0, 0.0
    for load in loads:
        key = 8 if load.corners <= 6 else 16
        # The table begins with one to two slots a touch, and grows to two to four a vertex.
        slots = max(2 * load.touched, 4 * load.vertices)
        names = 2 * key * load.vertices + (2 * key + 4) * load.touched
        plan = 8 * load.corners * load.pixels + 16 * (load.touched - load.vertices)
        most = max(most, held + plan + 2 * key * slots + names)
        # Small blocks that were freed stay with the process.
        held += plan + 8 * load.corners * load.vertices + 4 * matrix * load.pixels
        held += (2 * key + 4) * load.touched
        most = max(most, held + 8 * load.touched + 8 * load.pixels)
    rows = sum(8 * width * load.touched for load in loads)
    arrays = 5 * len(loads) + 1
    return max(most, held + rows + 4 * width * loads[0].pixels) + arrays * _HUGE_PAGE_BYTES


def _width(values: int) -> int:
    """Of a row: what is compiled in, else a multiple of 16."""
    widths = (1, 2, 4, 8, 12, 16, 20, 24, 32)
    return next((width for width in widths if values <= width), -(-values // 16) * 16)


def _torch(loads: Sequence[_Load], *, classes: int, matrix: bool) -> float:
    """Keys sorted, each with its pixel; then bags of all kernels, and rows of differences."""
    held, most, others = 0.0, 0.0, classes - 1
    for load in loads:
        key = 4 if load.corners == 3 else 8
        build = (49 + 3 * key) * load.corners * load.pixels + 40 * load.vertices
        table = 8 * load.corners * load.vertices + 8 * load.vertices
        most = max(most, held + build + table)
        held += 16 * load.corners * load.pixels + table
    corners = sum(load.corners * load.pixels for load in loads)
    vertices = sum(load.vertices for load in loads)
    joined = held + 24 * corners
    pixels = loads[0].pixels
    loop = held + 12 * corners + 4 * others * ((2 + 2 * matrix) * vertices + (6 + matrix) * pixels)
    return max(most, joined, loop + min(most / 2, _FREED_BYTES))


def _pydensecrf(loads: Sequence[_Load], *, classes: int, matrix: bool) -> float:
    """All lattices, and rows of the one that is filtered."""
    held = 12.0 * sum(load.corners * load.pixels for load in loads)
    held += sum((8 * load.corners + 24) * load.vertices for load in loads)
    rows = 8 * classes * max(load.vertices for load in loads)
    return held + rows + (24 * classes + 40) * loads[0].pixels
