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
from pipeline.crf.native_engine import MOST_KEPT_BYTES
from pipeline.errors import CrfError


class TorchEngine:
    """Mean field on one device; the CPU's threads are those given.

    Everything is relative to the last class, which is left out: logits are those above its, and
    differences are probabilities less its. What is called R holds the others.
    """

    def __init__(self, *, device: Device, threads: int) -> None:
        self._device, self._threads = device, threads
        self._kept: tuple[NDArray[np.float32], _Filter] | None = None

    @torch.inference_mode()
    def mean_field(
        self, energy_KN: NDArray[np.float32], kernels: Sequence[Pairwise], *, iterations: int
    ) -> NDArray[np.float32]:
        """As ``Engine.mean_field``."""
        torch.set_num_threads(self._threads)
        if len(energy_KN) == 1:
            return np.ones_like(energy_KN)
        messages = _Messages.of(kernels, [self._filter(kernel) for kernel in kernels])
        given_KN = torch.from_numpy(energy_KN).to(self._device)
        base_NR = (given_KN[-1:] - given_KN[:-1]).T.contiguous()
        odds = _Odds.of(base_NR.clone())
        base_NR += messages.bias_NR
        for _ in range(iterations):
            odds = _Odds.of(messages(odds.differences()).add_(base_NR))
        found_KN: NDArray[np.float32] = odds.probabilities().T.contiguous().cpu().numpy()
        return found_KN

    def _filter(self, kernel: Pairwise) -> _Filter:
        """Of the kernel's features; that of the last that recur is kept. Raises CrfError."""
        features_DN, kept = kernel.features_DN, self._kept
        if kernel.recurring and kept is not None and np.array_equal(kept[0], features_DN):
            return kept[1]
        found = _Filter.of(torch.from_numpy(features_DN).to(self._device))
        if kernel.recurring and features_DN.nbytes + found.held_bytes <= MOST_KEPT_BYTES:
            self._kept = features_DN, found
        return found


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

    lattices: list[_Lattice]
    matrices_RR: list[Tensor | None]
    """T transposed; None for a Potts kernel, whose weight is in ``slice_weight``."""

    bias_NR: Tensor | float
    """What no probability changes, because those of a pixel sum to 1."""

    pixel: Tensor
    start: Tensor
    splat_weight: Tensor
    vertex: Tensor
    """(N x V) int32: pixel by pixel, its vertices in all kernels' lattices."""

    bag: Tensor
    """(N,) int32: where in ``vertex`` each pixel begins."""

    slice_weight: Tensor
    """As ``vertex``."""

    @classmethod
    def of(cls, kernels: Sequence[Pairwise], filters: Sequence[_Filter]) -> _Messages:
        """Of kernels and what was built for each."""
        device = filters[0].pixel.device
        vertices = [0, *itertools.accumulate(filter_.lattice.vertices for filter_ in filters)]
        entries = [0, *itertools.accumulate(len(filter_.pixel) for filter_ in filters)]
        starts = [filter_.start + e for filter_, e in zip(filters, entries, strict=False)]
        matrices: list[Tensor | None] = []
        bias_NR: Tensor | float = 0.0
        rows_N: list[Tensor] = []
        weights_N: list[Tensor] = []
        for kernel, filter_, vertex in zip(kernels, filters, vertices, strict=False):
            weight, matrix_RR = kernel.compatibility, None
            if isinstance(weight, np.ndarray):
                matrix_RR, constant_R = _matrix_and_constant(torch.from_numpy(weight).to(device))
                bias_NR = bias_NR + filter_.of_ones()[:, None] * constant_R
                weight = 1.0
            matrices.append(matrix_RR)
            rows_N += (filter_.vertex_VN + vertex).unbind()
            weights_N += (filter_.slice_weight_VN * weight).unbind()
        bags = torch.arange(len(rows_N[0]), dtype=torch.int32, device=device)
        return cls(
            lattices=[filter_.lattice for filter_ in filters],
            matrices_RR=matrices,
            bias_NR=bias_NR,
            pixel=torch.cat([filter_.pixel for filter_ in filters]),
            start=torch.cat(starts),
            splat_weight=torch.cat([filter_.splat_weight for filter_ in filters]),
            # Of rows: a transposition takes twice as long.
            vertex=torch.stack(rows_N, 1).ravel(),
            bag=bags * len(rows_N),
            slice_weight=torch.stack(weights_N, 1).ravel(),
        )

    def __call__(self, difference_NR: Tensor) -> Tensor:
        """(N, R), to be added to the logits; a new tensor."""
        value_MR = F.embedding_bag(
            self.pixel, difference_NR, self.start, mode="sum", per_sample_weights=self.splat_weight
        )
        parts_MR = value_MR.split_with_sizes([lattice.vertices for lattice in self.lattices])
        for lattice, matrix_RR, part_MR in zip(
            self.lattices, self.matrices_RR, parts_MR, strict=True
        ):
            lattice.blur(part_MR)
            if matrix_RR is not None:
                part_MR.copy_(part_MR @ matrix_RR)
        return F.embedding_bag(
            self.vertex, value_MR, self.bag, mode="sum", per_sample_weights=self.slice_weight
        )


def _matrix_and_constant(penalty_KK: Tensor) -> tuple[Tensor, Tensor]:
    """T, transposed (R, R), and what G 1 is multiplied by (R,): see ``_Messages``."""
    above_RK = penalty_KK[:-1] - penalty_KK[-1:]
    mean_R1 = above_RK.mean(1, keepdim=True)
    return (mean_R1 - above_RK[:, :-1]).T.contiguous(), -mean_R1[:, 0]


@dataclass(frozen=True, slots=True, eq=False)
class _Filter:
    """A Gaussian over the features, symmetrically normalised: n K n."""

    lattice: _Lattice

    pixel: Tensor
    """(V x N) int32: pixels vertex by vertex, those of one in their order."""

    start: Tensor
    """(M,) int32: where in ``pixel`` each vertex begins."""

    splat_weight: Tensor
    """As ``pixel``."""

    vertex_VN: Tensor
    """int32: the vertices of each pixel's simplex."""

    slice_weight_VN: Tensor

    @classmethod
    def of(cls, features_DN: Tensor) -> _Filter:
        """Build the lattice and its weights. Raises CrfError for too wide a span."""
        corner_VN, rank_VN, weight_VN = _simplices(features_DN)
        key_VN, keys = _keys(corner_VN, rank_VN)
        columns = [key_N.sort(stable=True) for key_N in key_VN]
        key = torch.cat([key_N + r * keys.reach for r, (key_N, _) in enumerate(columns)])
        order_VN = torch.stack([order_N for _, order_N in columns])
        first = torch.ones_like(key, dtype=torch.bool)
        torch.ne(key[1:], key[:-1], out=first[1:])
        start = first.nonzero()[:, 0]
        end = torch.full_like(start[:1], len(key))
        number_VN = first.cumsum(0, dtype=torch.int32).sub_(1).view_as(key_VN)
        filter_ = cls(
            lattice=_Lattice.of(key.index_select(0, start), keys),
            pixel=order_VN.ravel().to(torch.int32),
            start=torch.cat([start, end]).to(torch.int32),
            splat_weight=weight_VN.gather(1, order_VN).ravel(),
            vertex_VN=torch.empty_like(number_VN).scatter_(1, order_VN, number_VN),
            slice_weight_VN=weight_VN.mul_(1 / (1 + 2.0 ** -len(features_DN))),
        )
        norm_N = (filter_.of_ones() + 1e-20).rsqrt_()
        # index_select: an index in brackets takes ten times as long.
        filter_.splat_weight.mul_(norm_N.index_select(0, filter_.pixel))
        filter_.slice_weight_VN.mul_(norm_N)
        return filter_

    @property
    def held_bytes(self) -> int:
        """On its device."""
        arrays = (self.pixel, self.start, self.splat_weight, self.vertex_VN, self.slice_weight_VN)
        neighbours = self.lattice.neighbour_VM2, self.lattice.pair
        return sum(array.nbytes for array in arrays + neighbours)

    def of_ones(self) -> Tensor:
        """(N,): what ones become."""
        one_N1 = torch.ones_like(self.slice_weight_VN[0, :, None])
        value_M1 = F.embedding_bag(
            self.pixel, one_N1, self.start, mode="sum", per_sample_weights=self.splat_weight
        )
        self.lattice.blur(value_M1)
        near_VN = value_M1[:, 0].index_select(0, self.vertex_VN.ravel()).view_as(self.vertex_VN)
        return near_VN.mul_(self.slice_weight_VN).sum(0)


@dataclass(frozen=True, slots=True, eq=False)
class _Lattice:
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
    def of(cls, known: Tensor, keys: _Keys) -> _Lattice:
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


def _simplices(features_DN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
class _Keys:
    """How vertices are numbered.

    All coordinates of a vertex leave the same remainder r when they are divided by V. So vertices
    are numbered, and sorted, apart for each r, by the quotients; the last follows from the others.
    """

    strides: tuple[int, ...]
    """Of each coordinate; 0 for the last."""

    reach: int
    """Numbers for each remainder."""


def _keys(corner_VN: Tensor, rank_VN: Tensor) -> tuple[Tensor, _Keys]:
    """The number of vertex r of each pixel (V, N), less r times the reach.

    In 32 bits where those hold them, which are sorted twice as fast. Raises CrfError where 64 do
    not.
    """
    d = len(corner_VN) - 1
    # A vertex and its neighbour lie so far around.
    low = (corner_VN[:-1].amin(1) - 2).cpu().tolist()
    high = (corner_VN[:-1].amax(1) + 2).cpu().tolist()
    strides, reach = [], 1
    for a, b in zip(low, high, strict=True):
        strides.append(reach)
        reach *= int(b - a) + 1
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
    for r in range(1, d + 1):  # vertex r takes one off the coordinate that comes r-th from last
        torch.sub(key_VN[r - 1], by_rank_VN[d + 1 - r], out=key_VN[r])
    return key_VN, _Keys((*strides, 0), reach)
