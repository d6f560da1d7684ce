"""The mean of features over a whole scene, added up so that nobody's tiles decide its bits.

Features are summed in float64 over blocks that are fixed in the scene, and the blocks are added in
the order of their grid, whoever computed them.

Axes in array names: B batch, C channel, N places, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.domain import Grid, Region, Shape

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_PX = MappingProxyType({2: 256, 3: 32})
"""Side of a block in pixels, by number of axes: a multiple of every output stride."""


@dataclass(frozen=True, slots=True, eq=False)
class GivenMean:
    """Image pooling by a mean that an earlier pass has found."""

    mean_C: NDArray[np.float64]

    def over(self, features_BCS: Tensor) -> Tensor:
        """(1, C, 1, ..), in the floats and on the device of ``features_BCS``; a new tensor."""
        return _placed(self.mean_C, features_BCS)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OwnMean:
    """Image pooling of an input that is the whole scene: the same mean, in the same pass."""

    valid_S: NDArray[np.bool_]
    """Which features count."""

    block: Shape
    """Side of a block per axis, in features."""

    def over(self, features_BCS: Tensor) -> Tensor:
        """(1, C, 1, ..): the mean of ``features_BCS``; a new tensor."""
        sums_CS = block_sums(features_BCS[0], self.valid_S, block=self.block)
        return _placed(mean_of(total_of([sums_CS])), features_BCS)


def block_grid(grid: Grid) -> Grid:
    """The blocks of a scene that is cut by ``grid``; no block lies in two tiles.

    They depend on the tile only where it is not made of whole blocks.
    """
    side = BLOCK_PX[len(grid.shape)]
    sides = (
        side if tile % side == 0 or tile >= length else tile
        for tile, length in zip(grid.tile, grid.shape, strict=True)
    )
    return replace(grid, tile=tuple(sides))


def valid_features(valid_S: NDArray[np.bool_], *, stride: int) -> NDArray[np.bool_]:
    """Which features count: those with a valid pixel among the ``stride`` px a side they stand for.

    So there is one wherever there is a valid pixel, and never a mean of nothing. ``valid_S`` starts
    at a feature; what its end lacks to a whole one lies outside the scene.
    """
    padded_S = np.pad(valid_S, [(0, -side % stride) for side in valid_S.shape])
    split = [part for side in padded_S.shape for part in (side // stride, stride)]
    return np.asarray(padded_S.reshape(split).any(axis=tuple(range(1, len(split), 2))))


def block_sums(
    features_CS: Tensor, valid_S: NDArray[np.bool_], *, block: Shape
) -> NDArray[np.float64]:
    """Sum over each block of the features that count, and last their number: (C + 1, *blocks).

    Args:
        features_CS: (C, *S) of any floats, from the first feature of a block.
        valid_S: (*S), which of them count.
        block: side per axis, in features; the last ones of an axis may be shorter.
    """
    import torch

    whole = Region.whole(valid_S.shape)
    blocks = tuple(-(-n // side) for n, side in zip(valid_S.shape, block, strict=True))
    features_SC, kept_S = features_CS.movedim(0, -1), torch.from_numpy(valid_S)
    sums_CN = np.empty((len(features_CS) + 1, math.prod(blocks)), dtype=np.float64)
    for number, part in enumerate(whole.blocks(block)):
        index = part.slices(within=whole)
        part_NC = features_SC[index][kept_S[index].to(features_CS.device)].double()
        sums_CN[:-1, number] = part_NC.sum(dim=0).cpu().numpy()
        sums_CN[-1, number] = len(part_NC)
    return sums_CN.reshape(-1, *blocks)


def total_of(slabs: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Sum (C + 1,) of all ``block_sums``, which come in slabs along the first axis of space.

    Added row by row of blocks, so that the height of the slabs does not matter.
    """
    total_C = np.zeros(1)
    for slab_CS in slabs:
        for row_CS in np.moveaxis(slab_CS, 1, 0):
            total_C = total_C + np.ascontiguousarray(row_CS).reshape(len(slab_CS), -1).sum(axis=1)
    return total_C


def mean_of(total_C: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean (C,) of the features that were added up to ``total_C`` (C + 1,)."""
    assert total_C[-1] > 0, "a scene without a valid pixel has no mean, and no tile asks for it"
    mean_C: NDArray[np.float64] = total_C[:-1] / total_C[-1]
    return mean_C


def _placed(mean_C: NDArray[np.float64], like_BCS: Tensor) -> Tensor:
    import torch

    shape = (1, -1, *(1,) * (like_BCS.ndim - 2))
    return torch.from_numpy(mean_C).to(like_BCS).reshape(shape)
