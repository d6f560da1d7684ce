"""The order of tiles: bands of neighbours, each tile once, and memory that does not grow."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace

import pytest

from pipeline.domain import Grid, Halo, Pass, Reach, Walk


def walk(
    shape: tuple[int, ...] = (20480, 20480), *, tile: int = 2048, halo: int = 64, crf: int = 0
) -> Walk:
    ndim = len(shape)
    return Walk(
        Pass(
            case="scene",
            name="segment",
            grid=Grid(shape=shape, tile=(tile,) * ndim, stride=4),
            reach=Reach(stride=4, halo=Halo.uniform(halo, ndim=ndim)),
            crf_halo=Halo.uniform(crf, ndim=ndim),
        )
    )


@pytest.mark.parametrize("shape", [(100, 100), (1030, 7000), (5000, 900), (70, 130, 260)])
def test_every_tile_is_walked_once(shape: tuple[int, ...]) -> None:
    """A tile left out is a hole in the mask; one done twice is work for nothing."""
    line = walk(shape, tile=64, halo=20)
    numbers = [tile.key.number for stretch in line.stretches() for tile in stretch]
    assert sorted(numbers) == list(range(len(line.sweep)))


def some(line: Walk, numbers: Iterable[int]) -> Walk:
    """The same, of these tiles alone."""
    return Walk(replace(line.sweep, chosen=tuple(numbers)))


@pytest.mark.parametrize("numbers", [[0], [3, 4, 5, 17], range(0, 100, 7), range(100)])
def test_tiles_that_run_alone_are_walked_once_and_none_else(numbers: Iterable[int]) -> None:
    """An area's tiles would be left out, or its scene be computed after all."""
    line = some(walk((5120, 5120), tile=512), numbers)
    walked = [tile.key.number for stretch in line.stretches() for tile in stretch]
    assert sorted(walked) == list(numbers)
    blocks = decoded(line, held=line.remembered_pixels // 512**2)
    assert 0.96 < blocks / len(line.sweep) / line.read_amplification <= 1


def test_a_band_is_walked_row_by_row() -> None:
    """What a tile shares with the one above would be forgotten before it is asked for again."""
    line = walk((8192, 8192))
    assert line.width == 2
    numbers = [[tile.key.number for tile in stretch] for stretch in line.stretches()]
    assert numbers == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]


@pytest.mark.parametrize(
    ("tile", "halo", "crf", "width"),
    [(512, 64, 0, 8), (2048, 64, 0, 2), (4096, 64, 0, 1), (4096, 520, 0, 2), (2048, 500, 40, 4)],
)
def test_a_band_is_so_wide_that_its_sides_are_a_quarter(
    tile: int, halo: int, crf: int, width: int
) -> None:
    """Narrower, its sides are decoded too often; wider, one row of it does not fit a memory."""
    assert walk(tile=tile, halo=halo, crf=crf).width == width


@pytest.mark.parametrize(("shape", "tile", "halo", "times"), [
    ((20480, 20480), 2048, 64, (2 * 4608 + 3 * 5120) / 20480),
    ((4096, 4096), 4096, 520, 1.0),
    ((3000, 700), 2048, 64, 1.0),
])  # fmt: skip
def test_what_is_decoded_twice_is_the_sides_of_bands(
    shape: tuple[int, ...], tile: int, halo: int, times: float
) -> None:
    """The plan would promise less reading than there is, or be feared for more."""
    assert walk(shape, tile=tile, halo=halo).read_amplification == pytest.approx(times)


def test_what_is_remembered_does_not_grow_with_the_scene() -> None:
    """A row of tiles of a continent would not fit; a small scene needs less than a band."""
    near, far = walk((20480, 20480)), walk((204800, 204800))
    assert near.remembered_pixels == far.remembered_pixels == 3072 * 5120
    assert walk((3000, 700)).remembered_pixels == 3000 * 700


def test_a_tile_alone_comes_back_to_nothing() -> None:
    """All that was decoded of a scene of one tile would be held beside it: 128 MiB at 4096 px."""
    assert walk((2000, 700)).remembered_pixels == 0
    assert some(walk((5120, 5120), tile=512), [17]).remembered_pixels == 0


@pytest.mark.parametrize(
    ("tile", "halo", "half"),
    [
        (512, 64, 1.25), (1024, 64, 1.25), (2048, 64, 1.25), (4096, 64, 1.0),
        (2048, 520, 1.25), (4096, 520, 1.25),
    ],
)  # fmt: skip
def test_that_memory_is_enough_for_a_reader_that_forgets_the_longest_unused(
    tile: int, halo: int, half: float
) -> None:
    """A little less, and every row of a band is decoded twice: 2.1 times the scene, measured."""
    line = walk((24576, 24576), tile=tile, halo=halo)
    blocks = line.remembered_pixels // 512**2
    assert decoded(line, held=blocks) / 48**2 < 1.25
    assert decoded(line, held=blocks // 2) / 48**2 > half


def decoded(line: Walk, *, held: int) -> int:
    """Blocks that a worker decodes which holds the ``held`` blocks that it used last."""
    count, kept = 0, OrderedDict[tuple[int, int], None]()
    for tile in (tile for stretch in line.stretches() for tile in stretch):
        (top, left), (bottom, right) = tile.read.start, tile.read.stop
        for y in range(top // 512, -(-bottom // 512)):
            for x in range(left // 512, -(-right // 512)):
                count += (y, x) not in kept
                kept[y, x] = None
                kept.move_to_end((y, x))
                if len(kept) > held:
                    kept.popitem(last=False)
    return count
