"""The sums behind the mean of a scene, on arrays: nobody's tiles may decide them."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch

from adapters.memory import MemoryStore
from pipeline.domain import Grid, Region
from pipeline.errors import StoreError
from pipeline.inference.scene_context import MISSING, SceneSums, sums_layout
from pipeline.models.scene_mean import (
    OwnMean,
    block_grid,
    block_sums,
    mean_of,
    total_of,
    valid_features,
)


def features_of(shape: tuple[int, ...], channels: int = 3) -> np.ndarray:
    """Numbers of very different sizes, whose sum shows its order."""
    rng = np.random.default_rng(5)
    return (rng.normal(size=(channels, *shape)) * 10 ** rng.uniform(-6, 6, shape)).astype("f4")


def sums_in_tiles(
    grid: Grid, features_CS: np.ndarray, valid_S: np.ndarray, *, order: list[int] | None = None
) -> SceneSums:
    """A store that tiles of the grid have filled, each from its own part."""
    shape, _ = sums_layout(grid, len(features_CS))
    sums = SceneSums(MemoryStore(shape, dtype="float64", fill=MISSING), grid)
    for number in order or range(len(grid)):
        core = grid.core(number)
        part = tuple(
            slice(a // grid.stride, -(-b // grid.stride))
            for a, b in zip(core.start, core.stop, strict=True)
        )
        features = torch.from_numpy(features_CS[(slice(None), *part)].copy())
        sums.write(core, block_sums(features, valid_S[part], block=sums.block))
    return sums


def test_the_total_does_not_depend_on_tiles_made_of_whole_blocks() -> None:
    """Another tile size would move the mean, and with it the last bits of every logit."""
    shape, stride = (1300, 1000), 8
    features_CS = features_of((163, 125))
    valid_S = np.random.default_rng(1).random((163, 125)) < 0.8
    totals = [
        sums_in_tiles(Grid(shape=shape, tile=tile, stride=stride), features_CS, valid_S).total
        for tile in ((256, 256), (512, 256), (768, 1000), (1304, 1000))
    ]
    assert all(np.array_equal(total, totals[0]) for total in totals[1:])
    one = OwnMean(valid_S=valid_S, block=(32, 32)).over(torch.from_numpy(features_CS)[None])
    assert np.array_equal(one[0, :, 0, 0].numpy(), mean_of(totals[0]).astype("f4"))


def test_the_total_is_that_of_all_features_that_count() -> None:
    """A block left out or counted twice would bend the whole scene."""
    for shape, tile, stride in [((70, 300), (96, 96), 4), ((40, 33, 70), (40, 32, 64), 2)]:
        grid = Grid(shape=shape, tile=tile, stride=stride)
        coarse = tuple(-(-n // stride) for n in shape)
        features_CS = features_of(coarse)
        valid_S = np.random.default_rng(2).random(coarse) < 0.5
        total = sums_in_tiles(grid, features_CS, valid_S).total
        want = [math.fsum(band_S[valid_S].astype(float)) for band_S in features_CS]
        assert total[:-1] == pytest.approx(want, rel=1e-12)
        assert total[-1] == valid_S.sum()


def test_the_order_of_tiles_does_not_matter() -> None:
    """Two actors would give another mean than one."""
    grid = Grid(shape=(700, 700), tile=(256, 256), stride=4)
    features_CS, valid_S = features_of((175, 175)), np.ones((175, 175), dtype=bool)
    first, second = (
        sums_in_tiles(grid, features_CS, valid_S, order=order).total
        for order in (list(range(9)), [8, 3, 1, 0, 7, 2, 6, 5, 4])
    )
    assert np.array_equal(first, second)


def test_a_mean_is_refused_while_sums_are_missing() -> None:
    """A tile that failed would count as one without pixels: a wrong mean, and nobody told."""
    grid = Grid(shape=(700, 700), tile=(256, 256), stride=4)
    features_CS, valid_S = features_of((175, 175)), np.zeros((175, 175), dtype=bool)
    sums = sums_in_tiles(grid, features_CS, valid_S, order=[0, 1, 2, 3, 5, 6, 7, 8])
    with pytest.raises(StoreError, match="sums of tiles are missing"):
        pickle.loads(pickle.dumps(sums)).total  # noqa: B018
    sums.write(grid.core(4), sums.zeros(grid.core(4)))
    assert not sums.total.any()


def test_blocks_lie_within_tiles() -> None:
    """Two tiles would write one block, and the last one win."""
    for shape, tile in [((5000, 300), (512, 304)), ((999, 999), (200, 256)), ((9, 60), (8, 64))]:
        grid = Grid(shape=shape, tile=tile, stride=8)
        blocks, seen = block_grid(grid), set()
        for core in grid.cores():
            for block in (block for block in blocks.cores() if (block & core).size):
                assert block in core
                seen.add(block)
        assert len(seen) == len(blocks)


def test_a_feature_counts_where_one_of_its_pixels_is_valid() -> None:
    """A mean of nothing, where valid pixels lie between the features' centres; or of padding."""
    valid_YX = np.zeros((7, 10), dtype=bool)
    valid_YX[1, 6] = valid_YX[6, 9] = True
    assert valid_features(valid_YX, stride=4).tolist() == [[0, 1, 0], [0, 0, 1]]
    for place in np.ndindex(3, 5, 2):
        valid_ZYX = np.zeros((3, 5, 2), dtype=bool)
        valid_ZYX[place] = True
        assert valid_features(valid_ZYX, stride=2).sum() == 1


def test_slabs_of_any_height_add_up_to_the_same_bits() -> None:
    """The height of a slab is the tile's."""
    sums_CS = features_of((12, 7), channels=4).astype("f8")
    whole = Region.whole((12, 7))
    totals = [
        total_of(
            sums_CS[(slice(None), *slab.slices(within=whole))] for slab in whole.blocks((h, 7))
        )
        for h in (1, 3, 4, 12)
    ]
    assert all(np.array_equal(total, totals[0]) for total in totals)
