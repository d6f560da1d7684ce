"""The CRF of a scene in tiles, through one lattice, against the same scene in one piece."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from pipeline.crf.dense import refine
from pipeline.crf.engine import engine_named, installed
from pipeline.crf.params import CrfParams, ResolvedCrf
from pipeline.crf.whole_scene import SceneCrf, SceneTile
from pipeline.domain import Grid
from pipeline.errors import CrfError
from pipeline.ports import Block

if not installed("native"):
    pytest.skip("the native CRF engine was not built here", allow_module_level=True)


def scene(shape: tuple[int, ...], *, classes: int) -> SceneTile:
    """Two regions of colour with noise, scores that lean to them, and a hole."""
    rng = np.random.default_rng(4)
    side_S = (np.indices(shape).sum(0) > sum(shape) / 2).astype(int)
    image_CS = np.clip(90 + 60 * side_S + rng.normal(0, 9, (2, *shape)), 0, 255).astype(np.uint8)
    logits_KS = rng.normal(0, 1, (classes, *shape))
    logits_KS[0] += 1.2 * side_S
    odds_KS = np.exp(logits_KS)
    valid_S = np.ones(shape, bool)
    valid_S[tuple(slice(n // 2, n // 2 + 5) for n in shape)] = False
    prob_KS = (odds_KS / odds_KS.sum(0)).astype(np.float32)
    return SceneTile(prob_KS=prob_KS, block=Block(image_CS, valid_S), origin=(0,) * len(shape))


def params(ndim: int) -> ResolvedCrf:
    mapping = {
        "iterations": 5,
        "smoothness": {"weight": 3, "position": 3},
        "appearance": {
            "weight": 4, "position": 30, "value": 10, "bands": ["a", "b"], "range": [0, 255],
        },
    }  # fmt: skip
    found = CrfParams.from_mapping(mapping)
    return found.resolve((1.0,) * ndim, unit="px", channels=("a", "b"))


def tiled(whole: SceneTile, tile: tuple[int, ...], *, threads: int = 2) -> np.ndarray:
    shape = whole.block.valid_S.shape
    result_KS = np.full_like(whole.prob_KS, np.nan)
    grid = Grid(shape=shape, tile=tile, stride=1)
    cores = [core.clip(shape) for core in grid.cores()]

    def load(core):
        here = (slice(None), *map(slice, core.start, core.stop))
        block = Block(whole.block.image_CS[here], whole.block.valid_S[here[1:]])
        return SceneTile(prob_KS=whole.prob_KS[here], block=block, origin=core.start)

    crf = SceneCrf(shape=shape, params=params(len(shape)), threads=threads)
    assert len(list(crf.gather(cores, load=load))) == crf.passes * len(cores)
    for core in cores:
        result_KS[(slice(None), *map(slice, core.start, core.stop))] = crf.finish(load(core))
    return result_KS


@pytest.mark.parametrize(
    ("shape", "tiles"),
    [((120, 132), [(120, 132), (60, 66), (30, 33), (17, 132)]), ((14, 24, 26), [(7, 12, 13)])],
)
@pytest.mark.parametrize("classes", [2, 7, 40])
def test_no_label_depends_on_the_tiling(shape, tiles, classes):
    """A lattice of a tile's own moves labels all along its borders, whatever the halo."""
    whole = scene(shape, classes=classes)
    alone_KS = refine(
        whole.prob_KS,
        block=whole.block,
        origin=whole.origin,
        params=params(len(shape)),
        engine=engine_named("native", device="cpu", threads=1),
    )
    assert (alone_KS.argmax(0) != whole.prob_KS.argmax(0)).mean() > 0.05
    for tile in tiles:
        found_KS = tiled(whole, tile)
        np.testing.assert_array_equal(found_KS.argmax(0), alone_KS.argmax(0))
        np.testing.assert_allclose(found_KS, alone_KS, atol=1e-5)


def test_the_same_tiles_give_the_same_bytes_on_any_number_of_threads():
    """Another machine would write another file."""
    whole = scene((300, 260), classes=3)
    seen = {tiled(whole, (150, 260), threads=n).tobytes() for n in (1, 2, 4)}
    assert len(seen) == 1


def test_a_scene_without_a_valid_pixel_comes_back_as_it_was():
    """There is then no lattice to read from."""
    whole = scene((20, 20), classes=3)
    whole.block.valid_S[:] = False
    assert tiled(whole, (10, 20)).tobytes() == whole.prob_KS.tobytes()


GROWTH = """
import resource
import numpy as np
from pipeline.crf.params import CrfParams
from pipeline.crf.whole_scene import SceneCrf, SceneTile
from pipeline.ports import Block

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

def load(number):
    image_CS = np.full((1, SIDE, SIDE), 90 + 60 * (number % 2), np.uint8)
    prob_KS = np.random.default_rng(number).random((3, SIDE, SIDE), np.float32)
    block = Block(image_CS, np.ones((SIDE, SIDE), bool))
    return SceneTile(prob_KS=prob_KS / prob_KS.sum(0), block=block, origin=(0, SIDE * number))

SIDE, TILES = 192, 40
kernel = {"weight": 4, "position": 40, "value": 10, "bands": ["a"], "range": [0, 255]}
params = CrfParams.from_mapping({"iterations": 2, "appearance": kernel})
crf = params.resolve((1, 1), unit="px", channels=("a",))
scene = SceneCrf(shape=(SIDE, SIDE * TILES), params=crf, threads=1)
few = SceneCrf(shape=(SIDE, SIDE * 2), params=crf, threads=1)
list(few.gather(range(2), load=load)), few.finish(load(0))
before = peak()
list(scene.gather(range(TILES), load=load)), [scene.finish(load(n)).shape for n in range(TILES)]
print(peak() - before)
"""


def test_nothing_of_a_tile_is_kept_when_the_next_one_comes():
    """What 40 tiles take would grow with the scene: here 5 MiB each, and the lattice under 1."""
    found = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True
    )
    assert int(found.stdout) < 20


def test_a_nan_at_a_valid_pixel_is_refused():
    """One NaN would spread over the whole scene."""
    whole = scene((20, 20), classes=3)
    whole.prob_KS[0, 3, 3] = np.nan
    with pytest.raises(CrfError, match="NaN"):
        tiled(whole, (10, 20))
