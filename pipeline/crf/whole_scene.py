"""Dense CRF of a scene in tiles, through one lattice under all of them: the tiling does not show.

The lattice and one tile are in memory; tiles are loaded again for each pass. There are three
passes before the iterations (which vertices exist, and two for the normalisation), then one for
each iteration, and one that hands out what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.crf.dense import to_engine
from pipeline.crf.engine import Pairwise
from pipeline.crf.native_engine import module_for_this_processor, penalties
from pipeline.crf.params import ResolvedCrf
from pipeline.domain import Shape
from pipeline.errors import CrfError
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


class SceneCrf:
    """The mean field of a scene: gathered from all tiles, then asked for each of them."""

    def __init__(self, *, shape: Shape, params: ResolvedCrf, threads: int) -> None:
        """Begin without a vertex.

        Args:
            shape: of the scene, in pixels.
            params: the CRF on this image's grid.
            threads: those that may be used; the result does not depend on them.
        """
        self._shape, self._params, self._threads = shape, params, threads
        self._scene: Any = None

    @property
    def passes(self) -> int:
        """How often ``gather`` visits each tile."""
        return PASSES_BEFORE + self._params.iterations

    @property
    def vertices(self) -> tuple[int, ...]:
        """Of each kernel's lattice, so far."""
        return () if self._scene is None else tuple(self._scene.vertices)

    def gather(self, tiles: Collection[T], *, load: Callable[[T], SceneTile]) -> Iterator[int]:
        """Run all passes, once; yield the number of the pass, from 1, after each visit.

        What comes of it holds only when it has been run to its end.

        Args:
            tiles: in a fixed order, which decides that of the sums.
            load: gives a tile, the same each time that it is asked.

        Raises:
            CrfError: a valid pixel is not finite, or the lattice cannot address the scene.
            ImportError: the native engine was not built here.
        """
        for number in range(1, self.passes + 1):
            for tile in tiles:
                self.visit(load(tile))
                yield number
            if self._scene is not None:
                self._scene.advance()

    def visit(self, found: SceneTile) -> None:
        """Take what the pass under way takes of a tile. Raises as ``gather``."""
        if not found.block.valid_S.any():
            return
        energy_KN, kernels = self._to_engine(found)
        try:
            if self._scene is None:
                self._scene = self._empty(kernels, classes=len(energy_KN))
            self._scene.visit(energy_KN, [kernel.features_DN for kernel in kernels])
        except (OverflowError, ValueError) as error:
            raise CrfError(f"crf: native engine: {error}") from error

    def finish(self, found: SceneTile) -> NDArray[np.float32]:
        """The tile's refined probabilities, (K, *S) float32, as ``dense.refine``; a new array."""
        refined_KS = found.prob_KS.astype(np.float32, order="C")
        valid_S = found.block.valid_S
        if valid_S.any():
            energy_KN, kernels = self._to_engine(found)
            features = [kernel.features_DN for kernel in kernels]
            refined_KS[:, valid_S] = self._scene.finish(energy_KN, features)
        return refined_KS

    def _to_engine(self, found: SceneTile) -> tuple[NDArray[np.float32], list[Pairwise]]:
        return to_engine(found.prob_KS, block=found.block, origin=found.origin, params=self._params)

    def _empty(self, kernels: Sequence[Pairwise], *, classes: int) -> Any:
        """Keys have room for all that the scene's shape and guides allow."""
        tops = [kernel.greatest(self._shape) for kernel in self._params.kernels]
        lows = [[0.0] * len(top) for top in tops]
        module = module_for_this_processor()
        return module.scene(lows, tops, penalties(kernels, classes=classes), self._threads)
