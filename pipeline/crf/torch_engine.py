"""Mean field in plain torch, on any device.

The permutohedral lattice of Adams, Baek and Davis (2010), as Krahenbuhl and Koltun's code has it:
vertices exist where a pixel touches them, the blur walks the axes in order, and a neighbour that
is absent counts 0. All sums are sums of bags of rows in a fixed order: no atomics, on CUDA either,
and the result does not depend on the number of threads.

D feature, N pixel, K class, M vertex, V = D + 1 vertices of a pixel's simplex.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.crf.engine import Device, Pairwise
from pipeline.errors import CrfError


class TorchEngine:
    """Mean field on one device; the CPU's threads are those given."""

    def __init__(self, *, device: Device, threads: int) -> None:
        self._device, self._threads = device, threads

    @torch.inference_mode()
    def mean_field(
        self, energy_KN: NDArray[np.float32], kernels: Sequence[Pairwise], *, iterations: int
    ) -> NDArray[np.float32]:
        """As ``Engine.mean_field``."""
        torch.set_num_threads(self._threads)
        logit_NK = -torch.from_numpy(energy_KN).to(self._device).T.contiguous()
        filters = [
            _Filter.of(torch.from_numpy(kernel.features_DN).to(self._device)) for kernel in kernels
        ]
        penalties = [self._penalty(kernel.compatibility) for kernel in kernels]
        prob_NK = logit_NK.softmax(1)
        for _ in range(iterations):
            next_NK = logit_NK.clone()
            for filter_, penalty in zip(filters, penalties, strict=True):
                near_NK = filter_(prob_NK)
                if isinstance(penalty, float):
                    next_NK.add_(near_NK, alpha=penalty)
                else:
                    next_NK.addmm_(near_NK, penalty, alpha=-1)
            prob_NK = next_NK.softmax(1)
        found_KN: NDArray[np.float32] = prob_NK.T.contiguous().cpu().numpy()
        return found_KN

    def _penalty(self, compatibility: float | NDArray[np.float32]) -> float | Tensor:
        if isinstance(compatibility, np.ndarray):
            return torch.from_numpy(compatibility).to(self._device)
        return float(compatibility)


@dataclass(frozen=True, slots=True, eq=False)
class _Filter:
    """A Gaussian over the features, symmetrically normalised: n K n."""

    lattice: _Lattice
    splat_weight: Tensor
    slice_weight_NV: Tensor

    ones_N1: Tensor
    """(N, 1): what a row of ones becomes. Probabilities sum to 1, so that one class follows."""

    @classmethod
    def of(cls, features_DN: Tensor) -> _Filter:
        lattice, weight_NV = _Lattice.of(features_DN)
        alpha = 1 / (1 + 2.0 ** -len(features_DN))
        pixel, order = lattice.pixel, lattice.order
        plain = cls(lattice, weight_NV.ravel()[order], weight_NV * alpha, weight_NV)
        one_N1 = torch.ones_like(weight_NV[:, :1])
        norm_N1 = (plain.rows(one_N1) + 1e-20).rsqrt()
        slice_NV = plain.slice_weight_NV * norm_N1
        splat = plain.splat_weight * norm_N1[:, 0][pixel]
        normed = cls(lattice, splat, slice_NV, one_N1)
        return cls(lattice, splat, slice_NV, normed.rows(one_N1))

    def __call__(self, prob_NK: Tensor) -> Tensor:
        """(N, K) float32 of probabilities that sum to 1 over K."""
        near = self.rows(prob_NK[:, :-1].contiguous())
        return torch.cat([near, self.ones_N1 - near.sum(1, keepdim=True)], 1)

    def rows(self, value_NK: Tensor) -> Tensor:
        """Any (N, K) values, filtered."""
        lattice = self.lattice
        value_MK = F.embedding_bag(
            lattice.pixel, value_NK, lattice.start, mode="sum",
            per_sample_weights=self.splat_weight,
        )  # fmt: skip
        for neighbour_M3 in lattice.neighbours:
            value_MK = F.embedding_bag(
                neighbour_M3, value_MK, mode="sum", per_sample_weights=lattice.blur_M3
            )
        return F.embedding_bag(
            lattice.vertex_NV, value_MK, mode="sum", per_sample_weights=self.slice_weight_NV
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Lattice:
    """The vertices that pixels touch, and one more, last, that is always 0."""

    vertex_NV: Tensor
    """(N, V) int32: the vertices of each pixel's simplex."""

    order: Tensor
    """(N x V) int64: places in ``vertex_NV``, vertex by vertex, pixels in their order."""

    pixel: Tensor
    """(N x V) int32: the pixels of those places."""

    start: Tensor
    """(M,) int32: where in ``pixel`` each vertex begins."""

    neighbours: list[Tensor]
    """(M, 3) int32 for each axis: a vertex and the two beside it; the last where there is none."""

    blur_M3: Tensor
    """(M, 3) float32: 1, 0.5, 0.5."""

    @classmethod
    def of(cls, features_DN: Tensor) -> tuple[_Lattice, Tensor]:
        """The lattice and barycentric weights (N, V). Raises CrfError for too wide a span."""
        corner_DN, rank_VN, weight_NV = _simplices(features_DN)
        keys, strides = _keys(corner_DN, rank_VN)
        sorted_, order = keys.ravel().sort(stable=True)
        first = torch.ones_like(sorted_, dtype=torch.bool)
        first[1:] = sorted_[1:] != sorted_[:-1]
        known = sorted_[first]
        number = torch.empty_like(order, dtype=torch.int32)
        number[order] = (first.cumsum(0) - 1).to(torch.int32)
        shape = weight_NV.shape
        start = first.nonzero()[:, 0]
        end = torch.full_like(start[:1], len(order))
        neighbours = [_beside(known, step) for step in _steps(strides)]
        blur = torch.tensor([1.0, 0.5, 0.5], device=keys.device)
        lattice = cls(
            vertex_NV=number.reshape(shape),
            order=order,
            pixel=(order // shape[1]).to(torch.int32),
            start=torch.cat([start, end]).to(torch.int32),
            neighbours=neighbours,
            blur_M3=blur.repeat(len(known) + 1, 1),
        )
        return lattice, weight_NV


def _simplices(features_DN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The corner of each pixel's simplex (V, N) int64, its order of axes (V, N), and weights (N, V).

    In float32 and in the order of the reference's code: another rounding is another vertex.
    """
    d = len(features_DN)
    elevated = [torch.zeros_like(features_DN[0])] * (d + 1)
    total = torch.zeros_like(features_DN[0])
    for j in range(d, 0, -1):
        scale = np.float32(math.sqrt(2 / 3) * (d + 1) / math.sqrt(j * (j + 1)))
        scaled = features_DN[j - 1] * float(scale)
        elevated[j] = total - j * scaled
        total = total + scaled
    elevated[0] = total
    elevated_VN = torch.stack(elevated)
    nearest_VN = (elevated_VN * float(np.float32(1 / (d + 1)))).round()
    corner_VN = nearest_VN * (d + 1)
    rank_VN = _ranks(elevated_VN - corner_VN) + nearest_VN.sum(0).to(torch.int64)
    wrap_VN = (rank_VN < 0).to(torch.int64) - (rank_VN > d).to(torch.int64)
    rank_VN += wrap_VN * (d + 1)
    corner_VN += wrap_VN * (d + 1)
    rest_NV = ((elevated_VN - corner_VN) * float(np.float32(1 / (d + 1)))).T
    falling_NV = torch.empty_like(rest_NV, memory_format=torch.contiguous_format)
    falling_NV.scatter_(1, rank_VN.T, rest_NV)  # by rank: greatest first
    weight_NV = torch.empty_like(falling_NV)
    weight_NV[:, 1:] = (falling_NV[:, :-1] - falling_NV[:, 1:]).flip(1)
    weight_NV[:, 0] = 1 + falling_NV[:, -1] - falling_NV[:, 0]
    return corner_VN.to(torch.int64), rank_VN, weight_NV


def _ranks(rest_VN: Tensor) -> Tensor:
    """(V, N) int64: how many others are greater; of equal ones, the earlier has the lower rank."""
    rank_VN = torch.zeros_like(rest_VN, dtype=torch.int64)
    for i in range(len(rest_VN)):
        for j in range(i + 1, len(rest_VN)):
            less_N = rest_VN[i] < rest_VN[j]
            rank_VN[i] += less_N
            rank_VN[j] += ~less_N
    return rank_VN


def _keys(corner_VN: Tensor, rank_VN: Tensor) -> tuple[Tensor, list[int]]:
    """One number for each vertex of each pixel (N, V) int64, and the stride of each coordinate.

    The last coordinate follows from the others. Raises CrfError where 64 bits do not hold them.
    """
    d = len(corner_VN) - 1
    margin = 2 * (d + 1)  # vertices of a simplex, and their neighbours, lie so far around
    low = (corner_VN[:-1].amin(1) - margin).tolist()
    high = (corner_VN[:-1].amax(1) + margin).tolist()
    strides, reach = [], 1
    for a, b in zip(low, high, strict=True):
        strides.append(reach)
        reach *= b - a + 1
    if reach >= 2**63:
        raise CrfError(
            f"crf: features span {reach:.1e} lattice points, 64 bits number 9.2e+18: use smaller"
            " tiles or larger deviations"
        )
    base_N = sum((row - a) * s for row, a, s in zip(corner_VN[:-1], low, strides, strict=True))
    assert isinstance(base_N, Tensor)
    whole = sum(strides)
    # Vertex r adds r to each coordinate, and takes V off those that come last in the order.
    keys = [base_N]
    stride_D1 = torch.tensor(strides, device=base_N.device)[:, None]
    for r in range(1, d + 1):
        wrapped_N = ((rank_VN[:-1] > d - r) * stride_D1).sum(0)
        keys.append(base_N + r * whole - (d + 1) * wrapped_N)
    return torch.stack(keys, 1), strides


def _steps(strides: Sequence[int]) -> list[int]:
    """What to add to a key to get to the neighbour, for each of V axes."""
    whole, d = sum(strides), len(strides)
    return [(d + 1) * stride - whole for stride in strides] + [-whole]


def _beside(known: Tensor, step: int) -> Tensor:
    """(M, 3) int32: each vertex, and its two neighbours along an axis; M where absent."""
    count = len(known)
    columns = [torch.arange(count, device=known.device)]
    for shift in (step, -step):
        place = torch.searchsorted(known, known + shift).clamp_(max=count - 1)
        columns.append(torch.where(known[place] == known + shift, place, count))
    beside_M3 = torch.stack(columns, 1)
    last = torch.full_like(beside_M3[:1], count)
    return torch.cat([beside_M3, last]).to(torch.int32)
