"""Dense CRF of a scene in tiles, through one lattice under all of them: the tiling does not show.

Each tile sums up what its pixels add to the lattice's vertices, tells its neighbours about the
vertices that they need as well, and reads its pixels' values from its own and their sums. What
tiles tell one another is kept in a store, so that any worker can go on with any tile, and nothing
of the scene is in memory but one tile. Sums are whole numbers: no tiling, no order and no number of
workers changes a bit of the result.

Rounds: in the first, tiles tell which vertices they touch. In each of the others they hear what
was told in the one before, and tell what follows from it; in the last it is the probabilities.

Axes in array names: K class, C channel, S space, N valid pixel, V vertex, D position feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.crf.dense import to_engine
from pipeline.crf.native_engine import module_for_this_processor, penalties
from pipeline.crf.params import ResolvedCrf
from pipeline.crf.placed_tile import PlacedTile, Room, Wanted
from pipeline.domain import Grid, Halo
from pipeline.errors import CrfError
from pipeline.ports import Block, RowStore


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScenePixels:
    """A tile without halo: tiles are disjoint, and together the scene."""

    number: int

    prob_KS: NDArray[np.float32]
    """(K, *S), sums to 1 over K where valid."""

    block: Block
    """What guides, over the same pixels."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Heard:
    """What tile and neighbours told, for each kernel: its own rows, then those of the others."""

    keys: Sequence[NDArray[np.uint64]] | None
    """(V, 2) of the others' vertices; None for a tile that has met them."""

    ones: Sequence[NDArray[np.int64]] | None
    """(V, 1); None with the keys."""

    sums: Sequence[NDArray[np.int64]] | None
    """(V, columns); None in the second round, when nobody has told any."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Told:
    """What a tile says in a round."""

    own: Sequence[NDArray[np.int64]]
    """(V, columns) of each kernel: sums of all vertices that its pixels touch."""

    sent: Mapping[str, NDArray[Any]]
    """What is for others, by the names that they ask for."""

    @property
    def rows(self) -> Mapping[str, NDArray[Any]]:
        """All of it, by name."""
        return {**{_own(kernel): own_V for kernel, own_V in enumerate(self.own)}, **self.sent}

    @property
    def vertices(self) -> int:
        """That the tile's pixels touch, all kernels summed."""
        return sum(len(own_V) for own_V in self.own)

    @property
    def sent_bytes(self) -> int:
        """Of what is for others."""
        return sum(array.nbytes for array in self.sent.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneCrf:
    """The mean field of a scene in tiles. Picklable."""

    grid: Grid
    params: ResolvedCrf

    @property
    def rounds(self) -> int:
        """How often each tile is visited."""
        return self.params.iterations + 2

    def reach(self, kernel: int) -> tuple[float, ...]:
        """How far a blur carries along each axis, in pixels: ``reach_of`` in scene.hpp."""
        deviations = self.params.kernels[kernel].position_px
        steps = [2 * math.sqrt(1.5 * (k + 1) / (k + 2)) for k in range(len(deviations))]
        return tuple(d * step for d, step in zip(deviations, reversed(steps), strict=True))

    def neighbours(self, kernel: int, number: int) -> list[int]:
        """Tiles that may need to know of a tile's vertices, and the other way round.

        A vertex lies within half a reach of its pixels, on both sides of the blur.
        """
        widths = tuple(math.ceil(2 * reach) + 2 for reach in self.reach(kernel))
        near = self.grid.core(number).grow(Halo(widths, widths)).clip(self.grid.shape)
        return [other for other in self.grid.meeting(near) if other != number]

    def hear(self, store: RowStore, turn: int, number: int, *, met: bool) -> Heard | None:
        """What the tile is to know in this round; nothing in the first.

        ``met``: it has its neighbours' vertices. Raises StoreError.
        """
        if turn == 0:
            return None
        own = [_own(kernel) for kernel in range(len(self.params.kernels))]

        def sums(since: int) -> list[NDArray[np.int64]]:
            told = [[rows_V] for rows_V in store.read(since, number, own)]
            return self._joined(store, since, number, name=_for, told=told)

        told = sums(turn - 1) if turn > 1 else None
        if met:
            return Heard(keys=None, ones=None, sums=told)
        keys = self._joined(store, 0, number, name=_keys, told=[[] for _ in own])
        return Heard(keys=keys, ones=sums(0), sums=told)

    def _joined(
        self,
        store: RowStore,
        turn: int,
        number: int,
        *,
        name: Callable[[int, int], str],
        told: list[list[NDArray[Any]]],
    ) -> list[NDArray[Any]]:
        """``told`` and what the others told this tile, for each kernel, in their order."""
        near = [self.neighbours(kernel, number) for kernel in range(len(told))]
        for other in sorted(set().union(*near)):
            asked = [kernel for kernel, others in enumerate(near) if other in others]
            found = store.read(turn, other, [name(number, kernel) for kernel in asked])
            for kernel, rows_V in zip(asked, found, strict=True):
                told[kernel].append(rows_V)
        return [_one(parts) for parts in told]

    def place(self, found: ScenePixels, room: Room) -> PlacedTile:
        """The tile's pixels in the lattice; keys have room for all that the scene allows.

        Raises CrfError: a valid pixel is not finite, or the lattice cannot address the scene.
        """
        valid_S = found.block.valid_S
        if not valid_S.any():
            return self.nothing(found.number)
        pixels = to_engine(
            found.prob_KS,
            block=found.block,
            origin=self.grid.core(found.number).start,
            params=self.params,
        )
        tops = [kernel.greatest(self.grid.shape) for kernel in self.params.kernels]
        try:
            native = module_for_this_processor().place_tile(
                room.team,
                pixels.energy_KN,
                [kernel.features_DN for kernel in pixels.kernels],
                [[0.0] * len(top) for top in tops],
                tops,
                penalties(pixels.kernels, classes=len(pixels.energy_KN)),
            )
        except (OverflowError, ValueError) as error:
            raise CrfError(f"crf: native engine: {error}") from error
        return PlacedTile(native=native, valid_S=valid_S, wanted=self._wanted(native, found.number))

    def tell(self, tile: PlacedTile, heard: Heard | None) -> Told:
        """What the tile says in this round, to itself and to its neighbours."""
        kernels, native = range(len(self.params.kernels)), tile.native
        if native is None:
            own = [_NOTHING for _ in kernels]
        elif heard is None:
            own = [native.ones(kernel) for kernel in kernels]
        else:
            prob_KN = _updated(tile, heard)
            own = [native.sums(kernel, prob_KN) for kernel in kernels]
        sent = {_for(w.other, w.kernel): own[w.kernel][w.chosen_V] for w in tile.wanted}
        if heard is None:
            keys = [_NOTHING if native is None else native.keys(kernel) for kernel in kernels]
            sent |= {_keys(w.other, w.kernel): keys[w.kernel][w.chosen_V] for w in tile.wanted}
        return Told(own=own, sent=sent)

    def finish(self, tile: PlacedTile, heard: Heard) -> NDArray[np.float32]:
        """The tile's refined probabilities, (K, *S) float32, 0 where not valid; a new array."""
        prob_KN, valid_S = _updated(tile, heard), tile.valid_S
        if valid_S.all():
            return prob_KN.reshape(-1, *valid_S.shape)
        refined_KS = np.zeros((len(prob_KN), *valid_S.shape), np.float32)
        refined_KS[:, valid_S] = prob_KN
        return refined_KS

    def _wanted(self, native: Any, number: int) -> list[Wanted]:
        """What each neighbour needs: the vertices within one and a half reaches of its pixels.

        A blur ends half a reach from them.
        """
        wanted: list[Wanted] = []
        for kernel, features in enumerate(self.params.kernels):
            deviations = np.array(features.position_px)
            margin = 1.5 * np.array(self.reach(kernel)) + 1
            position_VS = native.positions(kernel, len(margin))[:, ::-1] * deviations
            for other in self.neighbours(kernel, number):
                core = self.grid.core(other)
                near_VS = position_VS >= np.array(core.start) - margin
                near_VS &= position_VS <= np.array(core.stop) + margin
                wanted.append(Wanted(kernel, other, np.flatnonzero(near_VS.all(axis=1))))
        return wanted

    def nothing(self, number: int) -> PlacedTile:
        """A tile without a valid pixel."""
        wanted = [
            Wanted(kernel, other, np.zeros(0, np.intp))
            for kernel in range(len(self.params.kernels))
            for other in self.neighbours(kernel, number)
        ]
        valid_S = np.zeros(self.grid.core(number).shape, np.bool_)
        return PlacedTile(native=None, valid_S=valid_S, wanted=wanted, met=True)


def _updated(tile: PlacedTile, heard: Heard) -> NDArray[np.float32]:
    """Probabilities (K, N) of the round."""
    if heard.keys is not None and heard.ones is not None:
        for kernel, (keys_V, ones_V) in enumerate(zip(heard.keys, heard.ones, strict=True)):
            tile.native.meet(kernel, keys_V, ones_V)
        tile.met = True
    assert tile.met
    if heard.sums is not None:
        tile.native.read(heard.sums)
    prob_KN: NDArray[np.float32] = tile.native.update()
    return prob_KN


_NOTHING = np.zeros((0, 0), np.int64)
"""Rows of a tile without a valid pixel."""


def _own(kernel: int) -> str:
    return f"{kernel}"


def _for(other: int, kernel: int) -> str:
    return f"{kernel} to {other}"


def _keys(other: int, kernel: int) -> str:
    return f"{kernel} keys to {other}"


def _one(parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """One after another; those without a row are of no width either."""
    some = [part for part in parts if len(part)]
    return np.concatenate(some) if some else np.zeros((0, 0), np.int64)
