"""Who computes the mean field of a dense CRF: one small interface, several engines.

Axes in array names: K class, D feature, N pixel. Engines know neither images nor tiles: ``dense``
hands them energies and features, and takes probabilities back.
"""

from __future__ import annotations

import atexit
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CrfError

EngineName = Literal["native", "pydensecrf", "torch"]
"""Engines that compute; which one is part of a run's identity, for their last digits differ."""

Device = Literal["cpu", "cuda"]

_PREFERRED: dict[Device, tuple[EngineName, ...]] = {
    "cpu": ("native", "pydensecrf", "torch"),
    "cuda": ("torch",),
}
"""What ``auto`` takes: the first that is installed."""

_MODULES: dict[EngineName, str] = {
    "native": "pipeline.crf._native",
    "pydensecrf": "pydensecrf",
    "torch": "torch",
}

ABSENT_ENGINES: dict[EngineName, str] = {
    "native": "the native engine was not built; install a C++ compiler, then terravox again",
    "pydensecrf": "pydensecrf is not installed; pip install 'terravox[crf]' (needs a C++ compiler)",
    "torch": "torch is not installed",
}
"""What is missing where an engine cannot be had, and how to get it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairwise:
    """One Gaussian kernel over features, symmetrically normalised, and what it means for labels."""

    features_DN: NDArray[np.float32]
    """(D, N), C-ordered, finite, in units of the kernel's deviations."""

    compatibility: float | NDArray[np.float32]
    """The weight of a Potts kernel, or the symmetric (K, K) penalty of a pair of labels.

    A weight w is the matrix w (1 - I), and equals -w I: what all labels pay alike cancels.
    """

    recurring: bool = False
    """Whether the same features are likely to come again: an engine may keep what it built of them.

    That changes no byte.
    """


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """What a mean field is computed of: the valid pixels of an image."""

    energy_KN: NDArray[np.float32]
    """Unary energies, C-ordered, finite; N >= 1."""

    kernels: Sequence[Pairwise]
    """At least one, each over the same N pixels in the same order."""


class Engine(Protocol):
    """Mean field by a permutohedral lattice. Safe to call from several threads."""

    most_together: int = 0
    """Pixels of small images that take less time in one call than one by one; 0: none do."""

    def mean_field(
        self, energy_KN: NDArray[np.float32], kernels: Sequence[Pairwise], *, iterations: int
    ) -> NDArray[np.float32]:
        """Return (K, N) float32 probabilities, which sum to 1 over K; a new array, C-ordered.

        Q starts as softmax(-energy); each iteration updates all pixels at once. N >= 1.

        Args:
            energy_KN: unary energies, C-ordered, finite.
            kernels: at least one, each over the same N pixels in the same order.
            iterations: at least 1.

        Raises:
            CrfError: the features span more than the engine's lattice can address.
        """

    def mean_fields(
        self, problems: Sequence[Problem], *, iterations: int
    ) -> list[NDArray[np.float32]]:
        """What ``mean_field`` returns for each, to the bit.

        All have the same number of classes, and kernels that differ in their features alone, of
        which each has as many. Raises CrfError as it does.
        """
        return [
            self.mean_field(problem.energy_KN, problem.kernels, iterations=iterations)
            for problem in problems
        ]


def installed(name: EngineName) -> bool:
    """Whether an engine can be had here; loads nothing."""
    return importlib.util.find_spec(_MODULES[name]) is not None


def pick_engine(asked: EngineName | Literal["auto"], *, device: Device) -> EngineName:
    """The engine that is meant; ``auto`` goes by device, and by what is installed.

    Raises:
        CrfError: an engine is asked for by name and not installed, or none is.
    """
    wanted = _PREFERRED[device] if asked == "auto" else (asked,)
    for name in wanted:
        if installed(name):
            return name
    raise CrfError(f"crf: {ABSENT_ENGINES[wanted[0]]}; or use --crf off")


@lru_cache(maxsize=8)
def engine_named(name: EngineName, *, device: Device, threads: int) -> Engine:
    """The engine of that name, the same object for the same arguments.

    Args:
        name: what ``pick_engine`` gave.
        device: of the worker that calls it.
        threads: those an engine on the CPU may use; the result does not depend on them.

    Raises:
        CrfError: it is not installed here, or there is no such engine.
    """
    if name not in get_args(EngineName):
        raise CrfError(f"crf: no engine {name!r}; known are {', '.join(get_args(EngineName))}")
    pick_engine(name, device=device)
    if name == "torch":
        from pipeline.crf.torch_engine import TorchEngine

        return TorchEngine(device=device, threads=threads)
    if name == "native":
        from pipeline.crf.native_engine import NativeEngine

        return NativeEngine(threads)
    from pipeline.crf.pydensecrf_engine import PydensecrfEngine

    return PydensecrfEngine()


# Whoever still refers to the cache as the process ends would have nanobind report a leak.
atexit.register(engine_named.cache_clear)
