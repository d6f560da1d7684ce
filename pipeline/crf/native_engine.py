"""The native engine: a permutohedral lattice in C++, on threads (pipeline/crf/native).

The result depends neither on the number of threads nor on the processor: pixels are summed in parts
of a fixed size, parts are added in their order, and nothing is contracted into fused operations.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.crf.engine import Engine, Pairwise
from pipeline.errors import CrfError

MOST_CLASSES = 257
"""The widest row of the lattice's table is one less."""

MOST_FEATURES = 24
"""Of a kernel, as ``native/lattice.hpp`` says too."""

MOST_KEPT_BYTES = 64 << 20
"""Of plans that are kept for recurring features: of one image of 1,300 px a side, or of several."""


class NativeEngine(Engine):
    """Mean field on ``threads`` threads; Python's lock is not held."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._module = module_for_this_processor()
        self._shelf = self._module.Shelf(MOST_KEPT_BYTES)

    @property
    def plans_reused(self) -> int:
        """How often a kernel's plan was not built, because it had been kept."""
        return int(self._shelf.found)

    def mean_field(
        self, energy_KN: NDArray[np.float32], kernels: Sequence[Pairwise], *, iterations: int
    ) -> NDArray[np.float32]:
        """As ``Engine.mean_field``; up to MOST_FEATURES and MOST_CLASSES."""
        costs = penalties(kernels, classes=len(energy_KN))
        try:
            prob_KN: NDArray[np.float32] = self._module.mean_field(
                self._shelf,
                energy_KN,
                [kernel.features_DN for kernel in kernels],
                costs,
                [kernel.recurring for kernel in kernels],
                iterations,
                self._threads,
            )
        except (OverflowError, ValueError) as error:
            raise CrfError(f"crf: native engine: {error}") from error
        return prob_KN


def penalties(kernels: Sequence[Pairwise], *, classes: int) -> list[NDArray[np.float32]]:
    """Each kernel's (K, K) penalty of a pair of labels. Raises CrfError for too many classes."""
    if classes > MOST_CLASSES:
        raise CrfError(f"crf: {classes} classes, the native engine takes {MOST_CLASSES}")
    apart_KK = 1 - np.eye(classes, dtype=np.float32)
    given = [kernel.compatibility for kernel in kernels]
    matrices = [c if isinstance(c, np.ndarray) else c * apart_KK for c in given]
    return [np.ascontiguousarray(matrix, dtype=np.float32) for matrix in matrices]


def module_for_this_processor() -> Any:
    """The extension, built for AVX2 where this processor has it. Raises ImportError if absent."""
    plain = importlib.import_module("pipeline.crf._native")
    return importlib.import_module("pipeline.crf._native_avx2") if plain.has_avx2() else plain
