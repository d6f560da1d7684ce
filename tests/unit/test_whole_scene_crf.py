"""The CRF of a scene in tiles, through one lattice, against the same scene in one piece."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from adapters.row_files import RowFiles
from pipeline.crf.dense import refine
from pipeline.crf.engine import engine_named, installed
from pipeline.crf.params import CrfParams, ResolvedCrf
from pipeline.crf.placed_tile import PlacedTile, Room
from pipeline.crf.whole_scene import SceneCrf, ScenePixels
from pipeline.domain import Grid
from pipeline.errors import CrfError, StoreError
from pipeline.ports import Block

if not installed("native"):
    pytest.skip("the native CRF engine was not built here", allow_module_level=True)


def scene(shape: tuple[int, ...], *, classes: int) -> ScenePixels:
    """Two regions of colour with noise, scores that lean to them, and a hole."""
    rng = np.random.default_rng(4)
    side_S = (np.indices(shape).sum(0) > sum(shape) / 2).astype(int)
    image_CS = np.clip(90 + 60 * side_S + rng.normal(0, 9, (2, *shape)), 0, 255).astype(np.uint8)
    logits_KS = rng.normal(0, 1, (classes, *shape))
    logits_KS[0] += 1.2 * side_S
    odds_KS = np.exp(logits_KS)
    valid_S = np.ones(shape, bool)
    valid_S[tuple(slice(n // 2, n // 2 + 5) for n in shape)] = False
    prob_KS = np.where(valid_S, odds_KS / odds_KS.sum(0), 0).astype(np.float32)
    return ScenePixels(number=0, prob_KS=prob_KS, block=Block(image_CS, valid_S))


def params(ndim: int, *, position: float = 30, **more: object) -> ResolvedCrf:
    mapping = {
        "iterations": 3,
        "smoothness": {"weight": 3, "position": 3},
        "appearance": {
            "weight": 4, "position": position, "value": 10, "bands": ["a", "b"], "range": [0, 255],
        },
        **more,
    }  # fmt: skip
    found = CrfParams.from_mapping(mapping)
    return found.resolve((1.0,) * ndim, unit="px", channels=("a", "b"))


def tiled(
    whole: ScenePixels,
    tile: tuple[int, ...],
    crf: ResolvedCrf,
    folder: Path,
    *,
    threads: int = 2,
    keep: Callable[[int], bool] = lambda number: False,
) -> np.ndarray:
    """Every round over every tile, the tiles of each in another order; some kept between rounds."""
    shape = whole.block.valid_S.shape
    scene = SceneCrf(grid=Grid(shape=shape, tile=tile, stride=1), params=crf)
    room = Room(threads=threads)
    kept: dict[int, PlacedTile] = {}
    rows = RowFiles(folder / "x".join(map(str, tile)))
    result_KS = np.full_like(whole.prob_KS, np.nan)
    for turn in range(scene.rounds):
        for number in np.random.default_rng(turn).permutation(len(scene.grid)).tolist():
            core = scene.grid.core(number)
            here = (slice(None), *map(slice, core.start, core.stop))
            block = Block(whole.block.image_CS[here], whole.block.valid_S[here[1:]])
            found = ScenePixels(number=number, prob_KS=whole.prob_KS[here], block=block)
            placed = kept.get(number) or scene.place(found, room)
            if keep(number):
                kept[number] = placed
            heard = scene.hear(rows, turn, number, met=placed.met)
            if turn < scene.rounds - 1:
                rows.write(turn, number, scene.tell(placed, heard).rows)
            else:
                result_KS[here] = 0 if placed.native is None else scene.finish(placed, heard)
    return result_KS


def alone(whole: ScenePixels, crf: ResolvedCrf) -> np.ndarray:
    """The scene in one piece, by the engine without tiles."""
    return refine(
        whole.prob_KS,
        block=whole.block,
        origin=(0,) * whole.block.valid_S.ndim,
        params=crf,
        engine=engine_named("native", device="cpu", threads=1),
    )


@pytest.mark.parametrize(
    ("shape", "tiles"),
    [((120, 132), [(120, 132), (60, 66), (17, 132)]), ((14, 24, 26), [(7, 12, 13)])],
)
@pytest.mark.parametrize("classes", [2, 40])
def test_no_label_depends_on_the_tiling(shape, tiles, classes, tmp_path):
    """A lattice of a tile's own moves labels all along its borders, whatever the halo."""
    whole, crf = scene(shape, classes=classes), params(len(shape))
    alone_KS = alone(whole, crf)
    assert (alone_KS.argmax(0) != whole.prob_KS.argmax(0)).mean() > 0.05
    for tile in tiles:
        found_KS = tiled(whole, tile, crf, tmp_path)
        np.testing.assert_array_equal(found_KS.argmax(0), alone_KS.argmax(0))
        np.testing.assert_allclose(found_KS, alone_KS, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"compatibility": [[0, 2, 1], [2, 0, 3], [1, 3, 0.5]]}])
@pytest.mark.parametrize(
    ("shape", "tiles"),
    [((160, 140), [(160, 140), (40, 35)]), ((20, 18, 34), [(20, 18, 34), (20, 10, 11)])],
)
def test_not_a_bit_depends_on_tiles_that_lie_beyond_one_anothers_reach(
    shape, tiles, more, tmp_path
):
    """Here a tile hears of some of the others alone: one too few, and a sum would lack a part."""
    whole, crf = scene(shape, classes=3), params(len(shape), position=3.5, **more)
    seen = {tiled(whole, tile, crf, tmp_path).tobytes() for tile in tiles}
    for keep in (lambda number: True, lambda number: number % 3 > 0):
        seen.add(tiled(whole, tiles[-1], crf, tmp_path, keep=keep).tobytes())
    assert len(seen) == 1
    np.testing.assert_allclose(
        np.frombuffer(*seen, np.float32), alone(whole, crf).ravel(), atol=1e-5
    )


def test_a_tile_hears_nothing_of_those_beyond_its_reach():
    """The test above could not fail where all tiles told all others everything."""
    crf = params(2, position=3.5)
    scene = SceneCrf(grid=Grid(shape=(160, 140), tile=(40, 35), stride=1), params=crf)
    assert scene.neighbours(0, 0) == [1, 4, 5]
    assert len(scene.grid) == 16


def test_a_reach_that_is_taken_too_short_shows(monkeypatch, tmp_path):
    """The tests above could not fail where vertices near the border were of no account."""
    whole, crf = scene((160, 140), classes=3), params(2, position=3.5)
    wanted = tiled(whole, (40, 35), crf, tmp_path)
    monkeypatch.setattr(SceneCrf, "reach", lambda self, kernel: (0.5, 0.5))
    assert tiled(whole, (40, 35), crf, tmp_path).tobytes() != wanted.tobytes()


def test_the_same_tiles_give_the_same_bytes_on_any_number_of_threads(tmp_path):
    """Another machine would write another file."""
    whole = scene((300, 260), classes=3)
    seen = {tiled(whole, (150, 260), params(2), tmp_path, threads=n).tobytes() for n in (1, 2, 4)}
    assert len(seen) == 1


def test_a_scene_without_a_valid_pixel_has_no_probabilities(tmp_path):
    """There is then no lattice to read from."""
    whole = scene((20, 20), classes=3)
    whole.block.valid_S[:] = False
    assert not tiled(whole, (10, 20), params(2), tmp_path).any()


def test_a_tile_without_a_valid_pixel_changes_nothing_for_the_others(tmp_path):
    """What it does not tell would be missed by its neighbours."""
    whole = scene((60, 60), classes=3)
    whole.block.valid_S[:20, 20:40] = False
    seen = {tiled(whole, tile, params(2), tmp_path).tobytes() for tile in ((20, 20), (60, 60))}
    assert len(seen) == 1


def test_a_nan_at_a_valid_pixel_is_refused(tmp_path):
    """One NaN would spread over the whole scene."""
    whole = scene((20, 20), classes=3)
    whole.prob_KS[0, 3, 3] = np.nan
    with pytest.raises(CrfError, match="NaN"):
        tiled(whole, (10, 20), params(2), tmp_path)


def test_rows_that_are_damaged_or_missing_are_not_read(tmp_path):
    """A sum that lacks a tile's part would be taken for the whole."""
    rows = RowFiles(tmp_path)
    rows.write(0, 3, {"a": np.arange(1000)})
    np.testing.assert_array_equal(rows.read(0, 3, ["a"])[0], np.arange(1000))
    file = tmp_path / "0" / "3.npz"
    held = bytearray(file.read_bytes())
    held[2000] ^= 1
    file.write_bytes(held)
    for turn, name in ((0, "a"), (0, "b"), (1, "a")):
        with pytest.raises(StoreError, match="--fresh"):
            rows.read(turn, 3, [name])
