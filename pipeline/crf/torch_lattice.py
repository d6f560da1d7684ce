"""The permutohedral lattice in plain torch: where pixels lie in it, and which vertices they touch.

D feature, N pixel, M vertex, V = D + 1 vertices of a pixel's simplex, R column of values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import CrfError


@dataclass(frozen=True, slots=True, eq=False)
class Lattice:
    """The vertices that pixels touch, and one more, last, that is always 0."""

    neighbour_VM2: Tensor
    """int32, for each axis: the two vertices beside one; the last where there is none."""

    pair: Tensor
    """(M,) int32: where in a row of those each vertex begins, 0, 2, 4 and so on."""

    @property
    def vertices(self) -> int:
        """M, with the last."""
        return len(self.pair)

    def blur(self, value_MR: Tensor) -> None:
        """Along each axis in turn, in place."""
        for neighbour_M2 in self.neighbour_VM2:
            beside_MR = F.embedding_bag(neighbour_M2.ravel(), value_MR, self.pair, mode="sum")
            value_MR.add_(beside_MR, alpha=0.5)

    @classmethod
    def of(cls, known: Tensor, keys: Keys) -> Lattice:
        """Of the vertices that have these keys, each once, in ascending order.

        A step along an axis adds 1 to all coordinates and takes V off that of the axis. So the
        remainder rises, and one quotient falls by 1; from the last remainder on all rise first.
        """
        count, whole = len(known), sum(keys.strides)
        shape = (len(keys.strides), count + 1, 2)
        neighbour_VM2 = torch.full(shape, count, dtype=torch.int32, device=known.device)
        place_M = torch.arange(count + 1, dtype=torch.int32, device=known.device)
        last = (len(keys.strides) - 1) * keys.reach
        onward = torch.where(known < last, known + keys.reach, known + (whole - last))
        for stride, neighbour_M2 in zip(keys.strides, neighbour_VM2, strict=True):
            wanted = onward - stride
            at = torch.searchsorted(known, wanted).clamp_(max=count - 1)
            at.masked_fill_(known.index_select(0, at) != wanted, count)
            neighbour_M2[:-1, 0] = at
            neighbour_M2[:, 1].scatter_(0, at, place_M[:-1])
            neighbour_M2[-1] = count  # where all that met none were put
        return cls(neighbour_VM2, 2 * place_M)


def simplices(features_DN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each pixel's simplex: vertex 0 over V, the order of axes, int64; weights; all (V, N).

    In float32 and in the order of the reference's code: another rounding is another vertex.
    """
    d = len(features_DN)
    elevated_VN = features_DN.new_empty(d + 1, features_DN.shape[1])
    total_N = torch.zeros_like(features_DN[0])
    side = np.float32(math.sqrt(2 / 3) * (d + 1))
    for j in range(d, 0, -1):
        scale = np.float32(1 / math.sqrt(j * (j + 1)) * float(side))
        scaled_N = features_DN[j - 1] * float(scale)
        torch.sub(total_N, j * scaled_N, out=elevated_VN[j])
        total_N += scaled_N
    elevated_VN[0] = total_N
    down = float(np.float32(1 / (d + 1)))
    corner_VN = (elevated_VN * down).round_()
    rank_VN = _ranks(elevated_VN - corner_VN * (d + 1)) + corner_VN.sum(0).to(torch.int8)
    wrap_VN = (rank_VN < 0).to(torch.int8) - (rank_VN > d).to(torch.int8)
    rank_VN += wrap_VN * (d + 1)
    corner_VN += wrap_VN
    rest_VN = elevated_VN.sub_(corner_VN * (d + 1)).mul_(down)
    order_VN = rank_VN.to(torch.int64)
    falling_VN = torch.empty_like(rest_VN).scatter_(0, order_VN, rest_VN)
    weight_VN = torch.empty_like(falling_VN)
    weight_VN[1:] = (falling_VN[:-1] - falling_VN[1:]).flip(0)
    weight_VN[0] = 1 + falling_VN[-1] - falling_VN[0]
    return corner_VN, order_VN, weight_VN


def _ranks(rest_VN: Tensor) -> Tensor:
    """(V, N) int8: how many others are greater; of equal ones, the earlier has the lower rank."""
    rank_VN = torch.empty_like(rest_VN, dtype=torch.int8)
    rank_VN[:] = torch.arange(len(rest_VN), device=rest_VN.device)[:, None]
    for i in range(len(rest_VN) - 1):
        less_VN = (rest_VN[i] < rest_VN[i + 1 :]).view(torch.int8)
        rank_VN[i + 1 :] -= less_VN
        for less_N in less_VN:
            rank_VN[i] += less_N
    return rank_VN


@dataclass(frozen=True, slots=True)
class Keys:
    """How vertices are numbered.

    All coordinates of a vertex leave the same remainder r when they are divided by V. So vertices
    are numbered, and sorted, apart for each r, by the quotients; the last follows from the others.
    """

    strides: tuple[int, ...]
    """Of each coordinate; 0 for the last."""

    reach: int
    """Numbers for each remainder."""


def number_vertices(corner_VN: Tensor, rank_VN: Tensor, sizes: list[int]) -> tuple[Tensor, Keys]:
    """The number of vertex r of each pixel (V, N), less r times the reach.

    ``sizes``: pixels of each image; no two have a vertex in common. In 32 bits where those hold
    the numbers, which are sorted twice as fast. Raises CrfError where 64 do not.
    """
    d = len(corner_VN) - 1
    # A vertex and its neighbour lie so far around.
    low = (corner_VN[:-1].amin(1) - 2).cpu().tolist()
    high = (corner_VN[:-1].amax(1) + 2).cpu().tolist()
    strides, reach = [], 1
    for a, b in zip(low, high, strict=True):
        strides.append(reach)
        reach *= int(b - a) + 1
    one, reach = reach, reach * len(sizes)
    if reach * (d + 2) >= 2**63:
        raise CrfError(
            f"crf: features span {reach * (d + 2):.1e} lattice points, 64 bits number 9.2e+18: use"
            " smaller tiles or larger deviations"
        )
    dtype = torch.int32 if reach * (d + 2) < 2**31 else torch.int64  # with room for a step
    stride_V = torch.tensor([*strides, 0], dtype=dtype, device=corner_VN.device)
    key_VN = torch.empty_like(corner_VN, dtype=dtype)
    by_rank_VN = torch.empty_like(key_VN).scatter_(0, rank_VN, stride_V[:, None].expand_as(key_VN))
    key_VN[0] = sum(
        (row_N - a).to(dtype) * s for row_N, a, s in zip(corner_VN[:-1], low, strides, strict=True)
    )
    if len(sizes) > 1:
        first_P = one * torch.arange(len(sizes), dtype=dtype, device=key_VN.device)
        pixels_P = torch.tensor(sizes, device=key_VN.device)
        key_VN[0] += first_P.repeat_interleave(pixels_P, output_size=sum(sizes))
    for r in range(1, d + 1):  # vertex r takes one off the coordinate that comes r-th from last
        torch.sub(key_VN[r - 1], by_rank_VN[d + 1 - r], out=key_VN[r])
    return key_VN, Keys((*strides, 0), reach)
