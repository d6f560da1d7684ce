"""Mean field in plain torch, on any device.

The permutohedral lattice of Adams, Baek and Davis (2010), as Krahenbuhl and Koltun's code has it:
vertices exist where a pixel touches them, the blur walks the axes in order, and a neighbour that
is absent counts 0. All sums are sums of bags of rows in a fixed order: no atomics, on CUDA either,
and the result does not depend on the number of threads.

D feature, N pixel, K class, M vertex, V = D + 1 vertices of a pixel's simplex, R class but the
last.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.crf.engine import Device, Engine, Pairwise, Problem
from pipeline.crf.native_engine import MOST_KEPT_BYTES
from pipeline.crf.torch_lattice import Lattice, number_vertices, simplices
from pipeline.errors import CrfError

MOST_CACHED = 1 << 16
"""Pixels of small images in one call on a CPU: with more, arrays leave its caches (measured)."""

MOST_LAUNCHED = 1 << 20
"""The same on a GPU. A call is some 680 launches, which take as long as 0.2 to 0.34 million pixels:
with three times as many, launches come faster than they are worked off (counted, not measured)."""


class TorchEngine(Engine):
    """Mean field on one device; the CPU's threads are those given.

    Several images have one lattice, in which the image's number is a further digit of a vertex's
    key: nothing passes from one to another, and sums are in the order of each image by itself.

    Everything is relative to the last class, which is left out: logits are those above its, and
    differences are probabilities less its. What is called R holds the others.
    """

    def __init__(self, *, device: Device, threads: int) -> None:
        self._device, self._threads = device, threads
        self.most_together = MOST_CACHED if device == "cpu" else MOST_LAUNCHED
        self._kept: tuple[NDArray[np.float32], list[int], _Filter] | None = None

    def mean_field(
        self, energy_KN: NDArray[np.float32], kernels: Sequence[Pairwise], *, iterations: int
    ) -> NDArray[np.float32]:
        """As ``Engine.mean_field``."""
        problem = Problem(energy_KN=energy_KN, kernels=kernels)
        return self._mean_field(problem, [energy_KN.shape[1]], iterations=iterations)

    def mean_fields(
        self, problems: Sequence[Problem], *, iterations: int
    ) -> list[NDArray[np.float32]]:
        """As ``Engine.mean_fields``; one by one where 64 bits do not number all vertices."""
        sizes = [problem.energy_KN.shape[1] for problem in problems]
        try:
            found_KN = self._mean_field(_joined(problems), sizes, iterations=iterations)
        except CrfError:
            return super().mean_fields(problems, iterations=iterations)
        parts = np.split(found_KN, list(itertools.accumulate(sizes[:-1])), axis=1)
        return [np.ascontiguousarray(part_KN) for part_KN in parts]

    @torch.inference_mode()
    def _mean_field(
        self, problem: Problem, sizes: list[int], *, iterations: int
    ) -> NDArray[np.float32]:
        """Of images of so many pixels, one after the other. Raises CrfError."""
        torch.set_num_threads(self._threads)
        energy_KN, kernels = problem.energy_KN, problem.kernels
        if len(energy_KN) == 1:
            return np.ones_like(energy_KN)
        filters = [self._filter(kernel, sizes) for kernel in kernels]
        messages = _Messages.of(kernels, filters)
        given_KN = torch.from_numpy(energy_KN).to(self._device)
        base_NR = (given_KN[-1:] - given_KN[:-1]).T.contiguous()
        odds = _Odds.of(base_NR.clone())
        base_NR += messages.bias_NR
        for _ in range(iterations):
            odds = _Odds.of(messages(odds.differences()).add_(base_NR))
        found_KN: NDArray[np.float32] = odds.probabilities().T.contiguous().cpu().numpy()
        return found_KN

    def _filter(self, kernel: Pairwise, sizes: list[int]) -> _Filter:
        """Of the kernel's features; that of the last that recur is kept. Raises CrfError."""
        features_DN, kept = kernel.features_DN, self._kept
        known = kernel.recurring and kept is not None and kept[1] == sizes
        if kept is not None and known and np.array_equal(kept[0], features_DN):
            return kept[2]
        found = _Filter.of(torch.from_numpy(features_DN).to(self._device), sizes)
        if kernel.recurring and features_DN.nbytes + found.held_bytes <= MOST_KEPT_BYTES:
            self._kept = features_DN, sizes, found
        return found


def _joined(problems: Sequence[Problem]) -> Problem:
    """Their pixels, one after the other."""
    if len(problems) == 1:
        return problems[0]
    kernels = [
        replace(
            alike[0],
            features_DN=np.concatenate([kernel.features_DN for kernel in alike], axis=1),
            recurring=all(kernel.recurring for kernel in alike),
        )
        for alike in zip(*(problem.kernels for problem in problems), strict=True)
    ]
    energy_KN = np.concatenate([problem.energy_KN for problem in problems], axis=1)
    return Problem(energy_KN=energy_KN, kernels=kernels)


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
        as long as all the rest; so that is only sought where an exp could overflow, and only
        there it is taken off: no pixel's bytes depend on another's logits.
        """
        of_last: Tensor | float = 1.0
        if float(logit_NR.amax()) > _SAFE:
            top_N1 = logit_NR.amax(1, keepdim=True)
            top_N1.masked_fill_(top_N1 <= _SAFE, 0)
            logit_NR -= top_N1
            of_last = top_N1.neg_().exp_()
        odds_NR = logit_NR.exp_()
        # A product with ones is faster, and sums a row by where it lies.
        return cls(odds_NR, of_last, odds_NR.sum(1, keepdim=True).add_(of_last))

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

    lattices: list[Lattice]
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
                part_MR.copy_(_mixed(part_MR, matrix_RR))
        return F.embedding_bag(
            self.vertex, value_MR, self.bag, mode="sum", per_sample_weights=self.slice_weight
        )


_MOST_MIXED = 1 << 24
"""Numbers of which an index is made at once."""


def _mixed(value_MR: Tensor, matrix_RR: Tensor) -> Tensor:
    """The product, each row by itself: MKL's depends on how many there are, and on threads."""
    columns = value_MR.shape[1]
    index = torch.arange(columns, dtype=torch.int32, device=value_MR.device)
    parts = []
    for part_MR in torch.split(value_MR, max(1, _MOST_MIXED // columns)):
        bag = torch.arange(len(part_MR), dtype=torch.int32, device=value_MR.device) * columns
        weight = part_MR.ravel()
        parts.append(
            F.embedding_bag(
                index.repeat(len(part_MR)), matrix_RR, bag, mode="sum", per_sample_weights=weight
            )
        )
    return torch.cat(parts)


def _matrix_and_constant(penalty_KK: Tensor) -> tuple[Tensor, Tensor]:
    """T, transposed (R, R), and what G 1 is multiplied by (R,): see ``_Messages``."""
    above_RK = penalty_KK[:-1] - penalty_KK[-1:]
    mean_R1 = above_RK.mean(1, keepdim=True)
    return (mean_R1 - above_RK[:, :-1]).T.contiguous(), -mean_R1[:, 0]


@dataclass(frozen=True, slots=True, eq=False)
class _Filter:
    """A Gaussian over the features, symmetrically normalised: n K n."""

    lattice: Lattice

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
    def of(cls, features_DN: Tensor, sizes: list[int]) -> _Filter:
        """Build the lattice and its weights, of images of so many pixels. Raises CrfError."""
        corner_VN, rank_VN, weight_VN = simplices(features_DN)
        key_VN, keys = number_vertices(corner_VN, rank_VN, sizes)
        columns = [key_N.sort(stable=True) for key_N in key_VN]
        key = torch.cat([key_N + r * keys.reach for r, (key_N, _) in enumerate(columns)])
        order_VN = torch.stack([order_N for _, order_N in columns])
        first = torch.ones_like(key, dtype=torch.bool)
        torch.ne(key[1:], key[:-1], out=first[1:])
        start = first.nonzero()[:, 0]
        end = torch.full_like(start[:1], len(key))
        number_VN = first.cumsum(0, dtype=torch.int32).sub_(1).view_as(key_VN)
        filter_ = cls(
            lattice=Lattice.of(key.index_select(0, start), keys),
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
        total_N, *others_N = near_VN.mul_(self.slice_weight_VN).unbind()
        for near_N in others_N:  # torch's own sum takes another order for the last few pixels
            total_N += near_N
        return total_N
