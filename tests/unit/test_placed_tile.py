"""What a process keeps of a scene's tiles between rounds, and what it does not."""

from __future__ import annotations

import gc
import pickle

import numpy as np
import pytest

from pipeline.crf import placed_tile
from pipeline.crf.engine import installed
from pipeline.crf.placed_tile import CaseTiles, PlacedTile, Room

if not installed("native"):
    pytest.skip("the native CRF engine was not built here", allow_module_level=True)


def tile_of(size: int) -> PlacedTile:
    """Without a lattice, of so many bytes."""
    return PlacedTile(native=None, valid_S=np.zeros(size, np.bool_), wanted=())


def test_tiles_are_kept_while_there_is_room_and_the_first_of_them_stay() -> None:
    """In a cyclic order, keeping what was used last means that nothing is ever found again."""
    room, tiles = Room(threads=1), [tile_of(40) for _ in range(4)]
    for _ in range(3):
        kept = [room.keep(tile, most_bytes=100) for tile in tiles]
        assert kept == [True, True, False, False]


def test_a_tile_that_has_grown_beyond_the_room_is_let_go() -> None:
    """Tables that come with a tile's neighbours would be taken on top of what was planned."""
    room, tile = Room(threads=1), tile_of(40)
    assert room.keep(tile, most_bytes=100)
    tile.valid_S = np.zeros(101, np.bool_)
    assert not room.keep(tile, most_bytes=100)
    assert room.keep(tile_of(100), most_bytes=100)


def test_what_nobody_comes_for_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of a case that failed would fill the room of all that come after it."""
    monkeypatch.setattr(placed_tile, "PATIENCE", 5)
    room, left = Room(threads=1), tile_of(60)
    assert room.keep(left, most_bytes=100)
    kept = [room.keep(tile_of(50), most_bytes=100) for _ in range(8)]
    assert kept == [False] * 6 + [True, True]


def test_a_case_finds_what_is_kept_and_takes_nothing_along_when_it_travels() -> None:
    """A case would hold on to tiles beyond the room, or send them to every worker."""
    room, case, tile = Room(threads=1), CaseTiles(), tile_of(40)
    assert room.keep(tile, most_bytes=100)
    case.note(3, tile)
    assert case.find(3) is tile
    assert 3 in case
    assert 3 not in pickle.loads(pickle.dumps(case))
    room.let_go(tile)
    del tile
    gc.collect()
    assert case.find(3) is None
