"""How densely an image fills the lattice of a CRF, counted at a few places of it.

Memory follows the vertices that pixels touch: an image's touch a tenth of what those of noise do.

Axes in array names: C channel, S space, D feature, N valid pixel, V coordinate of the lattice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.crf.dense import features_of
from pipeline.crf.params import ResolvedCrf
from pipeline.domain import Region, Shape
from pipeline.errors import CrfError, SourceReadError
from pipeline.ports import Block, Source

PLACES = {2: 4, 3: 3}
"""That are looked at, by number of axes."""

SIDE = {2: 384, 3: 48}
"""Of a place, in pixels, by number of axes."""

_ROW_BITS = 9
"""That hold a row of a place."""

_ENOUGH = 0.5
"""Of a place's pixels, to be valid: the vertices of few would count for many."""

MARGIN = 1.25
"""A tile may have so many times the vertices of the densest place that was looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Density:
    """Vertices a pixel, the most that any place has: smaller ones have more, for their borders.

    >>> Density(runs=((2.0, 1.5, 1.2, 1.1),), places=4).touched(0, rows=3)
    1.5
    """

    runs: tuple[tuple[float, ...], ...]
    """Of each kernel, touched by runs of 1, 2, 4, .. rows, each run counted apart; the last is of
    all rows of a place."""

    places: int
    """Of the image, that were counted; 0 where none could be, and noise was."""

    def vertices(self, kernel: int) -> float:
        """Of a kernel, for each pixel."""
        return self.runs[kernel][-1]

    def touched(self, kernel: int, *, rows: int) -> float:
        """The same, a vertex counted for each run of at most so many rows that touches it."""
        return self.runs[kernel][min(max(rows, 1).bit_length(), len(self.runs[kernel])) - 1]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of it."""
        if self.places:
            return ()
        return ("no place of the image could be counted: the CRF's memory is that of noise",)

    def as_json(self) -> dict[str, Any]:
        """What the plan assumes."""
        vertices = [round(self.vertices(kernel), 3) for kernel in range(len(self.runs))]
        return {"vertices_per_pixel": vertices, "places": self.places, "margin": MARGIN}


def density_of(source: Source, crf: ResolvedCrf, *, tile: Shape) -> Density:
    """Of the kernels over this image, whose channels ``crf`` names, at places within a ``tile``.

    Places that cannot be read, or hold few valid pixels, are left out. Where none remains noise is
    counted, than which nothing is denser.
    """
    side = tuple(min(SIDE[len(tile)], n) for n in tile)
    counts = list(_counts(source, crf, side))
    found = counts or [_of_block(_noise(crf, side), crf)]
    most = [
        tuple(max(shares) for shares in zip(*kernel, strict=True))
        for kernel in zip(*found, strict=True)
    ]
    return Density(runs=tuple(most), places=len(counts))


def _counts(source: Source, crf: ResolvedCrf, side: Shape) -> Iterator[list[tuple[float, ...]]]:
    for region in _places(source.info.shape, side):
        try:
            block = source.read(region)
            if block.valid_S.mean() >= _ENOUGH:
                yield _of_block(block, crf)
        except (SourceReadError, CrfError):
            continue  # what is wrong there is the tiles' to say


def _places(shape: Shape, side: Shape) -> list[Region]:
    """Spread over the image: no two in one row or column. One where they would be all of it."""
    count, regions = PLACES[len(shape)], []
    for place in range(count):
        start = []
        for axis, (length, size) in enumerate(zip(shape, side, strict=True), start=1):
            share = (place * axis % count + 0.5) / count
            start.append(int(share * max(0, length - size)))
        stop = tuple(min(a + b, n) for a, b, n in zip(start, side, shape, strict=True))
        regions.append(Region(tuple(start), stop))
    return list(dict.fromkeys(regions))


def _noise(crf: ResolvedCrf, shape: Shape) -> Block:
    """All values of each guide band's range, alike often."""
    channels = 1 + max(itertools.chain([0], *(kernel.channels for kernel in crf.kernels)))
    image_CS = np.random.default_rng(0).random((channels, *shape), np.float32)
    for kernel in crf.kernels:
        ranges = kernel.guide.range if kernel.guide else ()
        for channel, (low, high) in zip(kernel.channels, ranges, strict=True):
            image_CS[channel] = low + (high - low) * (image_CS[channel] % 1)
    return Block(image_CS, np.ones(shape, np.bool_))


def _of_block(block: Block, crf: ResolvedCrf) -> list[tuple[float, ...]]:
    """Of each kernel, as ``Density.runs``. Raises CrfError."""
    row_N = np.nonzero(block.valid_S)[0]
    features = features_of(block, origin=(0,) * block.valid_S.ndim, params=crf)
    return [
        tuple((_touched(each_DN, row_N) * (len(each_DN) + 1) / len(row_N)).tolist())
        for each_DN in features
    ]


def _touched(features_DN: NDArray[np.float32], row_N: NDArray[np.intp]) -> NDArray[np.int64]:
    """Vertices of one kind that runs of 1, 2, 4, .. rows touch, each run counted apart, then all.

    A simplex has one vertex of each of V kinds, which are alike often.
    """
    # Sums of products with such numbers tell vertices apart, however many there could be.
    factor_V = np.random.default_rng(0).integers(2**62, size=len(features_DN) + 1)
    key_N = (_lowest(features_DN) * factor_V[:, None]).sum(0)
    placed_N = np.sort((key_N << _ROW_BITS) | row_N)
    runs = [placed_N >> run for run in range(_ROW_BITS + 1)]  # of 2 to this power rows
    return np.array([1 + np.count_nonzero(run_N[1:] != run_N[:-1]) for run_N in runs])


def _lowest(features_DN: NDArray[np.float32]) -> NDArray[np.int64]:
    """The vertex of remainder 0 of each pixel's simplex, over V: (V, N)."""
    d = len(features_DN)
    unit = math.sqrt(2 / 3) * (d + 1)
    scale_D = [unit / math.sqrt(k * (k + 1)) for k in range(1, d + 1)]
    scaled_DN = features_DN * np.array(scale_D)[:, None]
    place_VN = np.zeros((d + 1, features_DN.shape[1]))
    place_VN[:-1] = scaled_DN[::-1].cumsum(0)[::-1]
    place_VN[1:] -= np.arange(1, d + 1)[:, None] * scaled_DN
    corner_VN = np.rint(place_VN / (d + 1))
    rest_VN = place_VN - corner_VN * (d + 1)
    # Rounded coordinates do not sum to 0; those go back that were rounded furthest.
    greater_VN = np.zeros_like(corner_VN)
    for i, j in itertools.combinations(range(d + 1), 2):
        less_N = rest_VN[i] < rest_VN[j]
        greater_VN[i] += less_N
        greater_VN[j] += ~less_N
    rank_VN = greater_VN + corner_VN.sum(0)
    lowest_VN: NDArray[np.float64] = corner_VN + (rank_VN < 0) - (rank_VN > d)
    return lowest_VN.astype(np.int64)
