"""How many vertices of a CRF's lattice an image touches, counted at a few places of it.

Memory follows the vertices that pixels touch: an image's touch a tenth of what those of noise do.

Axes in array names: C channel, S space, D feature, N valid pixel, V vertex of a pixel's simplex.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.crf.dense import features_of
from pipeline.crf.density import Density
from pipeline.crf.params import ResolvedCrf
from pipeline.crf.simplices import keyed, simplices
from pipeline.domain import Region, Shape
from pipeline.errors import CrfError, SourceReadError
from pipeline.ports import Block, Source

PLACES = {2: 4, 3: 3}
"""That are looked at, by number of axes."""

SIDE = {2: 384, 3: 48}
"""Of a place, in pixels, by number of axes."""

_ENOUGH = 0.5
"""Of a place's pixels, to be valid: the vertices of few would count for many."""


def density_of(source: Source, crf: ResolvedCrf) -> Density:
    """Of the kernels over this image; ``crf`` names its channels.

    Places that cannot be read, or hold few valid pixels, are left out. Where none remains noise is
    counted, than which nothing is denser.
    """
    counts = list(_counts(source, crf))
    found = counts or [_of_block(_noise(crf, ndim=len(source.info.shape)), crf)]
    most = [
        tuple(max(shares) for shares in zip(*kernel, strict=True))
        for kernel in zip(*found, strict=True)
    ]
    return Density(runs=tuple(most), places=len(counts))


def _counts(source: Source, crf: ResolvedCrf) -> Iterator[list[tuple[float, ...]]]:
    for region in _places(source.info.shape):
        try:
            block = source.read(region)
            if block.valid_S.mean() >= _ENOUGH:
                yield _of_block(block, crf)
        except (SourceReadError, CrfError):
            continue  # what is wrong there is the tiles' to say


def _places(shape: Shape) -> list[Region]:
    """Spread over the image: no two in one row or column."""
    count, side = PLACES[len(shape)], SIDE[len(shape)]
    regions = []
    for place in range(count):
        start = []
        for axis, length in enumerate(shape, start=1):
            share = (place * axis % count + 0.5) / count
            start.append(int(share * max(0, length - side)))
        stop = tuple(min(a + side, n) for a, n in zip(start, shape, strict=True))
        regions.append(Region(tuple(start), stop))
    return regions


def _noise(crf: ResolvedCrf, *, ndim: int) -> Block:
    """All values of each guide band's range, alike often."""
    shape = (SIDE[ndim],) * ndim
    channels = 1 + max(itertools.chain([0], *(kernel.channels for kernel in crf.kernels)))
    image_CS = np.random.default_rng(0).random((channels, *shape), np.float32)
    for kernel in crf.kernels:
        ranges = kernel.guide.range if kernel.guide else ()
        for channel, (low, high) in zip(kernel.channels, ranges, strict=True):
            image_CS[channel] = low + (high - low) * (image_CS[channel] % 1)
    return Block(image_CS, np.ones(shape, np.bool_))


def _of_block(block: Block, crf: ResolvedCrf) -> list[tuple[float, ...]]:
    """Of each kernel, as ``Density.runs``. Raises CrfError."""
    rows_N = torch.from_numpy(np.nonzero(block.valid_S)[0])
    origin = (0,) * block.valid_S.ndim
    features = features_of(block, origin=origin, params=crf)
    runs = (SIDE[block.valid_S.ndim] - 1).bit_length() + 1
    counts = [_touched(each_DN, rows_N, runs) for each_DN in features]
    return [tuple((count / len(rows_N)).tolist()) for count in counts]


def _touched(features_DN: NDArray[np.float32], row_N: torch.Tensor, runs: int) -> NDArray[np.int64]:
    """Vertices that runs of 1, 2, 4, .. rows touch, each run counted apart: (runs,)."""
    corner_VN, rank_VN, _ = simplices(torch.from_numpy(features_DN))
    d = len(features_DN)
    # Sums of products with such numbers tell vertices apart, however many there could be.
    large = np.random.default_rng(0).integers(2**62, size=d).tolist()
    key_VN = keyed(corner_VN, rank_VN, strides=[*large, 0], low=[0] * d, dtype=torch.int64)
    counts = np.full(runs, len(key_VN))
    for unsorted_N in key_VN:  # vertices of one remainder are no other's
        key_N, order_N = unsorted_N.sort(stable=True)  # so that the rows of each rise
        place_N, other_N = row_N[order_N], key_N[1:] != key_N[:-1]
        for shift in range(runs):
            run_N = place_N >> shift
            counts[shift] += int((other_N | (run_N[1:] != run_N[:-1])).sum())
    return counts
