"""A tile's pixels in the lattice under a scene, and where a process keeps such tiles.

To find the pixels' simplices takes six times as long as a round with them, so a tile that was
placed stays where that was done while there is room. Nothing depends on it but time.

Axes in array names: S space, V vertex.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from pipeline.crf.native_engine import module_for_this_processor

PATIENCE = 4096
"""Visits of other tiles after which one that nobody came for makes room: its case has ended, or
another process does it now."""


class Wanted(NamedTuple):
    """What a neighbour needs of a tile."""

    kernel: int
    other: int

    chosen_V: NDArray[np.intp]
    """Which of the tile's vertices."""


@dataclass(slots=True, kw_only=True, eq=False, weakref_slot=True)
class PlacedTile:
    """A tile of which image and scores need not be read again."""

    native: Any
    """SceneTile of the extension; None where no pixel is valid."""

    valid_S: NDArray[np.bool_]
    wanted: Sequence[Wanted]

    met: bool = False
    """Whether it has the vertices of its neighbours, which stay the same."""

    @property
    def bytes(self) -> int:
        """Of memory."""
        lattice = 0 if self.native is None else int(self.native.bytes)
        return lattice + self.valid_S.nbytes + sum(w.chosen_V.nbytes for w in self.wanted)


class Room:
    """A process's threads for placed tiles, and the tiles that it keeps. For one thread."""

    def __init__(self, *, threads: int) -> None:
        """Raises ImportError where the native engine was not built."""
        self.team = module_for_this_processor().Team(threads)
        self._kept: dict[PlacedTile, int] = {}
        self._visits = 0

    def keep(self, tile: PlacedTile, *, most_bytes: int) -> bool:
        """Keep the tile if all that are kept take no more than ``most_bytes`` then.

        The first that fit stay: rounds visit tiles in one order, in which the one that was used
        longest ago is the next that is needed.
        """
        self._visits += 1
        self._kept.pop(tile, None)
        room = most_bytes - tile.bytes - sum(kept.bytes for kept in self._kept)
        if room < 0:
            self._kept = {
                kept: seen for kept, seen in self._kept.items() if self._visits - seen <= PATIENCE
            }
            return False
        self._kept[tile] = self._visits
        return True

    def let_go(self, tile: PlacedTile) -> None:
        """Keep it no longer."""
        self._kept.pop(tile, None)


class CaseTiles:
    """Tiles of one case that this process keeps, by number; nothing of it is pickled."""

    def __init__(self) -> None:
        self._tiles: WeakValueDictionary[int, PlacedTile] = WeakValueDictionary()

    def __reduce__(self) -> tuple[type[CaseTiles], tuple[()]]:
        return CaseTiles, ()

    def __contains__(self, number: int) -> bool:
        return number in self._tiles

    def find(self, number: int) -> PlacedTile | None:
        """The tile, if it is here."""
        return self._tiles.get(number)

    def note(self, number: int, tile: PlacedTile) -> None:
        """Find it from now on, as long as the process keeps it."""
        self._tiles[number] = tile

    def forget(self, number: int) -> None:
        """Find it no more."""
        self._tiles.pop(number, None)
