"""How much of the tiles under one lattice a worker keeps between rounds."""

from __future__ import annotations

from unittest.mock import patch

from workflows import lattice_size
from workflows.config import RefineOptions
from workflows.lattice_size import LatticeSize

ROOM = 2**20


def room_of(placed_bytes: int, budget: str | None = None) -> tuple[int, str]:
    """Of each of two workers, beside whom nothing is taken."""
    lattice = LatticeSize(
        vertices=0,
        sent_bytes=0,
        kept_bytes=0,
        tile_bytes=0,
        placed_bytes=placed_bytes,
        room_bytes=0,
    )
    options = RefineOptions(backend="serial", memory_budget=budget)
    with patch.object(lattice_size, "ROOM_BYTES", ROOM):
        found = lattice.with_room(options, peak_bytes=0, workers=2)
    return found.room_bytes, found.visits


def test_tiles_are_kept_where_a_tenth_of_them_can_be_or_a_budget_says_so():
    """Gigabytes would be taken for a few tiles in a hundred, which nobody sees in the time."""
    assert room_of(ROOM)[0] == 3 * ROOM // 4
    assert room_of(20 * ROOM)[0] == ROOM
    assert room_of(21 * ROOM) == (0, "read and placed anew at each visit")
    assert room_of(100 * ROOM, f"{4 * ROOM / 1e9}GB")[0] > ROOM
    assert "a worker" in room_of(100 * ROOM, f"{4 * ROOM / 1e9}GB")[1]
