"""Dense CRF of a scene in tiles, through one lattice under all of them: the tiling does not show.

The lattice and one tile are in memory; tiles are loaded again for each pass. There are three
passes before the iterations (which vertices exist, and two for the normalisation), then one for
each iteration, and one that hands out what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.crf.dense import to_engine
from pipeline.crf.engine import Pairwise
from pipeline.crf.native_engine import module_for_this_processor, penalties
from pipeline.crf.params import ResolvedCrf
from pipeline.domain import Shape
from pipeline.ports import Block

PASSES_BEFORE = 3
"""Vertices, ones, mass: see pipeline/crf/native/scene.hpp."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SceneTile:
    """A tile without halo: tiles are disjoint, and together the scene."""

    prob_KS: NDArray[np.float32]
    """(K, *S), sums to 1 over K where valid."""

    block: Block
    """What guides, over the same pixels."""

    origin: tuple[int, ...]
    """Scene coordinates of the first pixel, per axis."""


def refine_scene(
    tiles: Sequence[T],
    *,
    load: Callable[[T], SceneTile],
    shape: Shape,
    params: ResolvedCrf,
    threads: int,
) -> Iterator[tuple[T, NDArray[np.float32]]]:
    """Yield each tile with its refined probabilities, (K, *S) float32, as ``dense.refine``.

    Args:
        tiles: in a fixed order, which decides that of the sums.
        load: gives a tile, the same each time that it is asked.
        shape: of the scene, in pixels.
        params: the CRF on this image's grid.
        threads: those that may be used; the result does not depend on them.

    Raises:
        CrfError: a valid pixel is not finite, or the lattice cannot address the scene.
        ImportError: the native engine was not built here.
    """
    scene: Any = None
    for _ in range(PASSES_BEFORE + params.iterations):
        for tile in tiles:
            found = load(tile)
            if not found.block.valid_S.any():
                continue
            energy_KN, kernels = _to_engine(found, params)
            if scene is None:
                scene = _empty(kernels, len(energy_KN), shape=shape, params=params, threads=threads)
            scene.visit(energy_KN, [kernel.features_DN for kernel in kernels])
        if scene is not None:
            scene.advance()
    for tile in tiles:
        found = load(tile)
        refined_KS = found.prob_KS.astype(np.float32, order="C")
        valid_S = found.block.valid_S
        if valid_S.any():
            energy_KN, kernels = _to_engine(found, params)
            features = [kernel.features_DN for kernel in kernels]
            refined_KS[:, valid_S] = scene.finish(energy_KN, features)
        yield tile, refined_KS


def _to_engine(found: SceneTile, params: ResolvedCrf) -> tuple[NDArray[np.float32], list[Pairwise]]:
    return to_engine(found.prob_KS, block=found.block, origin=found.origin, params=params)


def _empty(
    kernels: Sequence[Pairwise],
    classes: int,
    *,
    shape: Shape,
    params: ResolvedCrf,
    threads: int,
) -> Any:
    """A scene without vertices: its keys have room for all that its shape and guides allow."""
    tops = [kernel.greatest(shape) for kernel in params.kernels]
    return module_for_this_processor().scene(
        [[0.0] * len(top) for top in tops], tops, penalties(kernels, classes=classes), threads
    )
