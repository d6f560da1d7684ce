"""Mean field in plain torch, on any device.

The permutohedral lattice of Adams, Baek and Davis (2010), as Krahenbuhl and Koltun's code has it:
vertices exist where a pixel touches them, the blur walks the axes in order, and a neighbour that
is absent counts 0. All sums are sums of bags of rows in a fixed order: no atomics, on CUDA either,
and the result does not depend on the number of threads.

D feature, N pixel, K class, M vertex, V = D + 1 vertices of a pixel's simplex.
"""

from __future__ import annotations

import itertools
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

    Everything is relative to the last class, which is left out: logits are those above its, and
    differences are probabilities less its. What is called R holds the others.
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
        base_NR = energy_NK[:, -1:] - energy_NK[:, :-1]
        if not base_NR.shape[1]:
            return np.ones_like(energy_KN)
        odds = _Odds.of(base_NR.clone())
        messages = _Messages.of(kernels, device=self._device)
        messages.add_constants(base_NR)
        for _ in range(iterations):
            odds = _Odds.of(messages(odds.differences()).add_(base_NR))
        found_KN: NDArray[np.float32] = odds.probabilities().T.contiguous().cpu().numpy()
        return found_KN


_SAFE = 80.0
"""A logit whose exp, times the classes, float32 holds."""


@dataclass(frozen=True, slots=True, eq=False)
class _Odds:
    """Probabilities before they are divided by their sum."""

    of_others_NR: Tensor
    of_last: Tensor | float
    """(N, 1)."""

    sum_N1: Tensor

    @classmethod
    def of(cls, logit_NR: Tensor) -> _Odds:
        """Overwrites the logits.

        A torch softmax over so short an axis takes ten times as long, and a row's greatest logit
        as long as all the rest; so that is only sought where exp could overflow.
        """
        of_last: Tensor | float = 1.0
        if float(logit_NR.amax()) > _SAFE:
            top_N1 = logit_NR.amax(1, keepdim=True).clamp_(min=0)
            logit_NR -= top_N1
            of_last = top_N1.neg_().exp_()
        odds_NR = logit_NR.exp_()
        ones_R1 = odds_NR.new_ones(odds_NR.shape[1], 1)
        return cls(odds_NR, of_last, (odds_NR @ ones_R1).add_(of_last))

    def differences(self) -> Tensor:
        """(N, R), each less the last class's; overwrites the odds."""
        return self.of_others_NR.sub_(self.of_last).div_(self.sum_N1)

    def probabilities(self) -> Tensor:
        """(N, K); a new tensor."""
        last_N1 = torch.as_tensor(self.of_last, device=self.sum_N1.device).expand_as(self.sum_N1)
        return torch.cat([self.of_others_NR, last_N1], 1).div_(self.sum_N1)


@dataclass(frozen=True, slots=True, eq=False)
class _Messages:
    """What all kernels add to the logits: one splat, each its blur, one slice.

    With a penalty matrix mu, a(k, l) = mu(k, l) - mu(K, l) and A_k = sum over l of a(k, l), a
    kernel G adds sum over l of T(k, l) G r_l, with T = A_k / K - a(k, l), and -A_k / K times G 1.
    """

    filters: list[_Filter]
    matrices_RR: list[Tensor | float]
    """T transposed; the weight of a Potts kernel."""

    constants_R: list[Tensor | None]
    pixel: Tensor
    start: Tensor
    splat_weight: Tensor
    vertex_NV: Tensor
    slice_weight_NV: Tensor

    @classmethod
    def of(cls, kernels: Sequence[Pairwise], *, device: Device) -> _Messages:
        """Build the lattices, on the device. Raises CrfError."""
        filters = [_Filter.of(torch.from_numpy(k.features_DN).to(device)) for k in kernels]
        terms = [_matrix_and_constant(k.compatibility, device=device) for k in kernels]
        lattices = [filter_.lattice for filter_ in filters]
        vertices = [0, *itertools.accumulate(lattice.vertices for lattice in lattices)]
        entries = [0, *itertools.accumulate(len(lattice.pixel) for lattice in lattices)]
        starts = [lattice.start + first for lattice, first in zip(lattices, entries, strict=False)]
        rows = [lattice.vertex_NV + v for lattice, v in zip(lattices, vertices, strict=False)]
        return cls(
            filters=filters,
            matrices_RR=[matrix for matrix, _ in terms],
            constants_R=[constant for _, constant in terms],
            pixel=torch.cat([lattice.pixel for lattice in lattices]),
            start=torch.cat(starts),
            splat_weight=torch.cat([filter_.splat_weight for filter_ in filters]),
            vertex_NV=torch.cat(rows, 1),
            slice_weight_NV=torch.cat([filter_.slice_weight_NV for filter_ in filters], 1),
        )

    def add_constants(self, logit_NR: Tensor) -> None:
        """What no probability changes, because those of a pixel sum to 1."""
        for filter_, constant_R in zip(self.filters, self.constants_R, strict=True):
            if constant_R is not None:
                logit_NR += filter_.of_ones() * constant_R

    def __call__(self, difference_NR: Tensor) -> Tensor:
        """(N, R), to be added to the logits; a new tensor."""
        splat_MR = F.embedding_bag(
            self.pixel, difference_NR, self.start, mode="sum", per_sample_weights=self.splat_weight
        )
        sizes = [filter_.lattice.vertices for filter_ in self.filters]
        near_MR = torch.cat(
            [
                filter_.lattice.blur(part_MR) * matrix_RR
                if isinstance(matrix_RR, float)
                else filter_.lattice.blur(part_MR) @ matrix_RR
                for filter_, matrix_RR, part_MR in zip(
                    self.filters, self.matrices_RR, splat_MR.split_with_sizes(sizes), strict=True
                )
            ]
        )
        return F.embedding_bag(
            self.vertex_NV, near_MR, mode="sum", per_sample_weights=self.slice_weight_NV
        )


def _matrix_and_constant(
    compatibility: float | NDArray[np.float32], *, device: Device
) -> tuple[Tensor | float, Tensor | None]:
    """T, transposed, and what G 1 is multiplied by: see ``_Messages``."""
    if not isinstance(compatibility, np.ndarray):
        return float(compatibility), None
    penalty_KK = torch.from_numpy(compatibility).to(device)
    above_RK = penalty_KK[:-1] - penalty_KK[-1:]
    mean_R1 = above_RK.mean(1, keepdim=True)
    return (mean_R1 - above_RK[:, :-1]).T.contiguous(), -mean_R1[:, 0]


@dataclass(frozen=True, slots=True, eq=False)
class _Filter:
    """A Gaussian over the features, symmetrically normalised: n K n."""

    lattice: _Lattice
    splat_weight: Tensor
    slice_weight_NV: Tensor

    @classmethod
    def of(cls, features_DN: Tensor) -> _Filter:
        """Build the lattice and its weights. Raises CrfError."""
        lattice, weight_NV = _Lattice.of(features_DN)
        alpha = 1 / (1 + 2.0 ** -len(features_DN))
        # index_select: an index in brackets takes ten times as long.
        splat = weight_NV.ravel().index_select(0, lattice.order)
        plain = cls(lattice, splat, weight_NV * alpha)
        norm_N1 = (plain.of_ones() + 1e-20).rsqrt()
        splat = splat * norm_N1[:, 0].index_select(0, lattice.pixel)
        return cls(lattice, splat, plain.slice_weight_NV * norm_N1)

    def of_ones(self) -> Tensor:
        """(N, 1): what a row of ones becomes."""
        lattice = self.lattice
        one_N1 = torch.ones_like(self.slice_weight_NV[:, :1])
        value_M1 = F.embedding_bag(
            lattice.pixel, one_N1, lattice.start, mode="sum", per_sample_weights=self.splat_weight
        )
        return F.embedding_bag(
            lattice.vertex_NV,
            lattice.blur(value_M1),
            mode="sum",
            per_sample_weights=self.slice_weight_NV,
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

    @property
    def vertices(self) -> int:
        """M, with the last."""
        return len(self.blur_M3)

    def blur(self, value_MR: Tensor) -> Tensor:
        """(M, R), along each axis in turn; a new tensor."""
        for neighbour_M3 in self.neighbours:
            value_MR = F.embedding_bag(
                neighbour_M3, value_MR, mode="sum", per_sample_weights=self.blur_M3
            )
        return value_MR

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
        number.scatter_(0, order, first.cumsum(0).to(torch.int32) - 1)
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
    """One number for each vertex of each pixel (N, V), and the stride of each coordinate.

    The last coordinate follows from the others. In 32 bits where those hold them, which are sorted
    twice as fast. Raises CrfError where 64 do not.
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
    dtype = torch.int32 if reach < 2**30 else torch.int64  # with room for a step
    # Vertex r adds r to each coordinate, and takes V off those that come last in the order.
    key_NV = torch.empty(corner_VN.T.shape, dtype=dtype, device=corner_VN.device)
    stride_V = torch.tensor([*strides, 0], dtype=dtype, device=corner_VN.device)
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
    place_M = torch.arange(count + 1, dtype=torch.int32, device=known.device)
    found = torch.searchsorted(known, known + step).clamp_(max=count - 1)
    met = known.index_select(0, found) == known + step
    after_M, before_M = torch.full_like(place_M, count), torch.full_like(place_M, count)
    found = torch.where(met, found, count)
    after_M[:-1] = found
    before_M.scatter_(0, found, place_M[:-1])
    before_M[-1] = count  # where all that met none were put
    return torch.stack([place_M, after_M, before_M], 1)
