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
    """Mean field on one device; the CPU's threads are those given.

    Probabilities sum to 1, so that the last class is left out throughout: what is called R holds
    the others, and logits are those above the last one's.
    """

    def __init__(self, *, device: Device, threads: int) -> None:
        self._device, self._threads = device, threads

    @torch.inference_mode()
    def mean_field(
        self, energy_KN: NDArray[np.float32], kernels: Sequence[Pairwise], *, iterations: int
    ) -> NDArray[np.float32]:
        """As ``Engine.mean_field``."""
        torch.set_num_threads(self._threads)
        energy_NK = torch.from_numpy(energy_KN).to(self._device).T.contiguous()
        logit_NR = energy_NK[:, -1:] - energy_NK[:, :-1]
        prob_NR = _probabilities(logit_NR.clone())
        messages = [_Message.of(kernel, device=self._device) for kernel in kernels]
        for message in messages:
            logit_NR += message.constant
        for _ in range(iterations):
            sum_NR = logit_NR.clone()
            for message in messages:
                sum_NR += message.of_last(message.filter(prob_NR))
            prob_NR = _probabilities(sum_NR)
        last_N1 = 1 - prob_NR.sum(1, keepdim=True)
        prob_NK = torch.cat([prob_NR, last_N1.clamp_(min=0)], 1)
        found_KN: NDArray[np.float32] = prob_NK.T.contiguous().cpu().numpy()
        return found_KN


def _probabilities(logit_NR: Tensor) -> Tensor:
    """Softmax where the class left out has logit 0; in place.

    torch's own softmax over so short an axis took ten times as long (measured at 6 classes).
    """
    if not logit_NR.shape[1]:
        return logit_NR
    top_N1 = logit_NR.amax(1, keepdim=True).clamp_(min=0)
    odds_NR = logit_NR.sub_(top_N1).exp_()
    return odds_NR.div_(odds_NR.sum(1, keepdim=True).add_(top_N1.neg_().exp_()))


@dataclass(frozen=True, slots=True, eq=False)
class _Message:
    """What a kernel adds to the logits."""

    filter: _Filter
    weight: float
    matrix_RR: Tensor | None
    """None for Potts: the weight is all."""

    constant: Tensor
    """(N, R): the part that no probability changes, because those of a pixel sum to 1."""

    @classmethod
    def of(cls, kernel: Pairwise, *, device: Device) -> _Message:
        """Build its lattice, on the device."""
        filter_ = _Filter.of(torch.from_numpy(kernel.features_DN).to(device))
        if not isinstance(kernel.compatibility, np.ndarray):
            weight = float(kernel.compatibility)
            return cls(filter_, weight, None, -weight * filter_.ones_N1)
        penalty_KK = torch.from_numpy(kernel.compatibility).to(device)
        above_RK = penalty_KK[-1:] - penalty_KK[:-1]
        last_R1 = above_RK[:, -1:]
        return cls(filter_, 1.0, (above_RK[:, :-1] - last_R1).T, filter_.ones_N1 @ last_R1.T)

    def of_last(self, near_NR: Tensor) -> Tensor:
        """(N, R) from the filtered probabilities, which it overwrites."""
        if self.matrix_RR is not None:
            return near_NR @ self.matrix_RR
        return near_NR.add_(near_NR.sum(1, keepdim=True)).mul_(self.weight)


@dataclass(frozen=True, slots=True, eq=False)
class _Filter:
    """A Gaussian over the features, symmetrically normalised: n K n."""

    lattice: _Lattice
    splat_weight: Tensor
    slice_weight_NV: Tensor

    ones_N1: Tensor
    """(N, 1): what a row of ones becomes."""

    @classmethod
    def of(cls, features_DN: Tensor) -> _Filter:
        """Build the lattice and its weights. Raises CrfError."""
        lattice, weight_NV = _Lattice.of(features_DN)
        alpha = 1 / (1 + 2.0 ** -len(features_DN))
        one_N1 = torch.ones_like(weight_NV[:, :1])
        plain = cls(lattice, weight_NV.ravel()[lattice.order], weight_NV * alpha, one_N1)
        norm_N1 = (plain(one_N1) + 1e-20).rsqrt()
        splat, slice_NV = norm_N1[:, 0][lattice.pixel], plain.slice_weight_NV * norm_N1
        splat *= plain.splat_weight
        return cls(lattice, splat, slice_NV, cls(lattice, splat, slice_NV, one_N1)(one_N1))

    def __call__(self, value_NR: Tensor) -> Tensor:
        """(N, R) float32, filtered; a new tensor."""
        lattice = self.lattice
        if not value_NR.shape[1]:
            return value_NR.clone()
        value_MR = F.embedding_bag(
            lattice.pixel, value_NR, lattice.start, mode="sum",
            per_sample_weights=self.splat_weight,
        )  # fmt: skip
        for neighbour_M3 in lattice.neighbours:
            value_MR = F.embedding_bag(
                neighbour_M3, value_MR, mode="sum", per_sample_weights=lattice.blur_M3
            )
        return F.embedding_bag(
            lattice.vertex_NV, value_MR, mode="sum", per_sample_weights=self.slice_weight_NV
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
        corner_VN, rank_NV, weight_NV = _simplices(features_DN)
        keys, strides = _keys(corner_VN, rank_NV)
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
    """Of each pixel's simplex: a corner (V, N), the order of axes (N, V), int64; weights (N, V).

    In float32 and in the order of the reference's code: another rounding is another vertex.
    """
    d = len(features_DN)
    elevated = [torch.zeros_like(features_DN[0])] * (d + 1)
    total = torch.zeros_like(features_DN[0])
    side = np.float32(math.sqrt(2 / 3) * (d + 1))
    for j in range(d, 0, -1):
        scale = np.float32(1 / math.sqrt(j * (j + 1)) * float(side))
        scaled = features_DN[j - 1] * float(scale)
        elevated[j] = total - j * scaled
        total = total + scaled
    elevated[0] = total
    elevated_VN = torch.stack(elevated)
    nearest_VN = (elevated_VN * float(np.float32(1 / (d + 1)))).round()
    corner_VN = nearest_VN * (d + 1)
    rank_VN = _ranks(elevated_VN - corner_VN) + nearest_VN.sum(0).to(torch.int8)
    wrap_VN = (rank_VN < 0).to(torch.int8) - (rank_VN > d).to(torch.int8)
    rank_VN += wrap_VN * (d + 1)
    rank_NV = rank_VN.T.to(torch.int64, memory_format=torch.contiguous_format)
    corner_VN += wrap_VN * (d + 1)
    rest_NV = ((elevated_VN - corner_VN) * float(np.float32(1 / (d + 1)))).T
    falling_NV = torch.empty_like(rest_NV, memory_format=torch.contiguous_format)
    falling_NV.scatter_(1, rank_NV, rest_NV)  # by rank: greatest first
    weight_NV = torch.empty_like(falling_NV)
    weight_NV[:, 1:] = (falling_NV[:, :-1] - falling_NV[:, 1:]).flip(1)
    weight_NV[:, 0] = 1 + falling_NV[:, -1] - falling_NV[:, 0]
    return corner_VN.to(torch.int64), rank_NV, weight_NV


def _ranks(rest_VN: Tensor) -> Tensor:
    """(V, N) int8: how many others are greater; of equal ones, the earlier has the lower rank."""
    rank_VN = torch.zeros_like(rest_VN, dtype=torch.int8)
    for i in range(len(rest_VN)):
        for j in range(i + 1, len(rest_VN)):
            less_N = rest_VN[i] < rest_VN[j]
            rank_VN[i] += less_N
            rank_VN[j] += ~less_N
    return rank_VN


def _keys(corner_VN: Tensor, rank_NV: Tensor) -> tuple[Tensor, list[int]]:
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
    # Vertex r adds r to each coordinate, and takes V off those that come last in the order.
    key_NV = torch.empty(corner_VN.T.shape, dtype=torch.int64, device=corner_VN.device)
    stride_V = torch.tensor([*strides, 0], device=corner_VN.device)
    by_rank_NV = torch.empty_like(key_NV).scatter_(1, rank_NV, stride_V.expand_as(rank_NV))
    key_NV[:, 0] = sum(
        (row - a) * s for row, a, s in zip(corner_VN[:-1], low, strides, strict=True)
    )
    key_NV[:, 1:] = sum(strides) - (d + 1) * by_rank_NV[:, 1:].flip(1)
    return key_NV.cumsum_(1), strides


def _steps(strides: Sequence[int]) -> list[int]:
    """What to add to a key to get to the neighbour, for each of V axes."""
    whole, d = sum(strides), len(strides)
    return [(d + 1) * stride - whole for stride in strides] + [-whole]


def _beside(known: Tensor, step: int) -> Tensor:
    """(M, 3) int32: each vertex, and its two neighbours along an axis; M where absent."""
    count = len(known)
    beside_M3 = torch.full((count + 1, 3), count, dtype=torch.int32, device=known.device)
    place = torch.arange(count + 1, dtype=torch.int32, device=known.device)
    beside_M3[:, 0] = place
    after = torch.searchsorted(known, known + step).clamp_(max=count - 1)
    met = (known[after] == known + step).nonzero()[:, 0]
    beside_M3[met, 1] = after[met].to(torch.int32)
    beside_M3[after[met], 2] = place[met]
    return beside_M3
