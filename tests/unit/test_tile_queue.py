"""The queue decides what becomes of tiles that fail or kill; these are its rules."""

from __future__ import annotations

import pytest

from pipeline.domain import Grid, Halo, Pass, Reach, Tile
from pipeline.execution.queue import MAX_ATTEMPTS, MAX_DEATHS, TileQueue
from pipeline.ports import Record


@pytest.fixture
def tiles() -> list[Tile]:
    sweep = Pass(
        case="scene",
        name="segment",
        grid=Grid(shape=(8, 8), tile=(4, 4), stride=4),
        reach=Reach(stride=4, halo=Halo.uniform(4, ndim=2)),
        crf_halo=Halo.uniform(0, ndim=2),
    )
    return list(sweep.tiles())


def failed(tile: Tile) -> Record:
    return Record(key=tile.key, status="failed", error="bad")


def test_tiles_come_out_once_each_in_order(tiles: list[Tile]) -> None:
    """A queue that repeats or drops a tile would lose or redo work."""
    queue = TileQueue(iter(tiles))
    taken = []
    while (tile := queue.take(alone=True)) is not None:
        taken.append(tile)
    assert taken == tiles
    assert queue.empty


def test_a_failed_tile_comes_back_after_the_fresh_ones_and_is_then_given_up(
    tiles: list[Tile],
) -> None:
    """Without a last attempt a bad tile would hold the run for ever."""
    queue = TileQueue(tiles)
    first = queue.take(alone=True)
    assert first is not None
    assert queue.settle(first, failed(first)) is None
    for _ in tiles[1:]:
        queue.take(alone=True)
    assert queue.take(alone=False) == first
    assert MAX_ATTEMPTS == 2
    assert queue.settle(first, failed(first)) == failed(first)
    assert queue.empty


def test_a_suspect_is_handed_only_to_a_worker_that_is_alone(tiles: list[Tile]) -> None:
    """Two suspects on one worker would convict the innocent one with the killer."""
    queue = TileQueue(tiles[:2])
    a, b = queue.take(alone=True), queue.take(alone=False)
    assert a is not None
    assert b is not None
    assert queue.died(a, error="x") is None
    assert queue.died(b, error="x") is None
    assert queue.take(alone=False) is None
    assert not queue.empty
    assert queue.take(alone=True) == a
    assert queue.is_suspect(a)


def test_a_tile_that_keeps_killing_is_quarantined_with_its_deaths(tiles: list[Tile]) -> None:
    """A poison tile must end as a failed record, never as an endless loop."""
    queue = TileQueue(tiles[:1])
    record = None
    for _ in range(MAX_DEATHS):
        assert record is None
        tile = queue.take(alone=True)
        assert tile is not None
        record = queue.died(tile, error="the worker died")
    assert record is not None
    assert (record.status, record.deaths, record.error) == ("failed", 3, "the worker died")
    assert queue.empty
