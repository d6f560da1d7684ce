"""What the lattice under a whole scene is expected to take, from a few places of its guide."""

from __future__ import annotations

import math

import numpy as np

from pipeline.crf.params import ResolvedCrf, ResolvedKernel
from pipeline.crf.whole_scene import SceneCrf, SceneTile
from pipeline.domain import Pass, Region
from pipeline.ports import Source

PLACES = 5
"""Tiles that are looked at, evenly spread."""

SIDE = {2: 1024, 3: 128}
"""The most that is read of one, in pixels, by number of axes."""

_TABLE_BYTES = 288
"""Of a vertex: its key, twice while the list grows, and up to eight slots of the hash table."""


def expected_lattice(source: Source, sweep: Pass, crf: ResolvedCrf, *, classes: int) -> int:
    """Bytes of the lattice, were all the scene like the place where it is densest.

    A place counts the vertices that its neighbours touch as well, so that this is rather too much.

    Raises SourceReadError or CrfError.
    """
    numbers = sorted({place * (len(sweep) - 1) // (PLACES - 1) for place in range(PLACES)})
    counts = [_vertices(source, sweep.tile(n).core, crf, classes=classes) for n in numbers]
    pixels = math.prod(sweep.grid.shape)
    expected = 0
    for kernel, shares in zip(crf.kernels, zip(*counts, strict=True), strict=True):
        expected += math.ceil(max(shares) * pixels) * _vertex_bytes(kernel, classes=classes)
    return expected


def _vertices(source: Source, core: Region, crf: ResolvedCrf, *, classes: int) -> tuple[float, ...]:
    """Vertices of each kernel per pixel, at the start of ``core``."""
    side = SIDE[core.ndim]
    region = Region(
        core.start, tuple(min(a + side, b) for a, b in zip(core.start, core.stop, strict=True))
    )
    block = source.read(region)
    even_KS = np.full((classes, *region.shape), 1 / classes, np.float32)
    lattice = SceneCrf(shape=source.info.shape, params=crf, threads=1)
    lattice.visit(SceneTile(prob_KS=even_KS, block=block, origin=region.start))
    count = int(block.valid_S.sum())
    return tuple(found / count for found in lattice.vertices) or (0.0,) * len(crf.kernels)


def _vertex_bytes(kernel: ResolvedKernel, *, classes: int) -> int:
    """Its place in the tables, two neighbours an axis, two masses, and two rows of differences."""
    axes = len(kernel.position_px) + len(kernel.channels) + 1
    width = classes + classes // 2 + 1  # no less than the engine rounds up to
    return _TABLE_BYTES + 4 * (2 * axes + 2 + 2 * width)
