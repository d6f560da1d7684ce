"""The native CRF engine against pydensecrf, against brute force, and against itself."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pipeline.crf.dense import refine
from pipeline.crf.engine import Pairwise, engine_named, installed
from pipeline.crf.native_engine import NativeEngine
from pipeline.crf.params import CrfParams
from pipeline.errors import CrfError
from pipeline.ports import Block

if not installed("native"):
    pytest.skip("the native CRF engine was not built here", allow_module_level=True)

NAMES = {
    "aerial": "natural/doodler_aerial/D800_20160308_222129lr02-0.jpg",
    "coast": "natural/doodler_coast/LC08_014035_20150215_lr_db_db.jpg",
    "marsh": "natural/doodler_aerial/D800_20160308_222135lr03-2.jpg",
}


def solve(energy_KN, kernels, *, engine="native", iterations=10, threads=1):
    solver = engine_named(engine, device="cpu", threads=threads)
    return solver.mean_field(energy_KN, kernels, iterations=iterations)


def energies(guide_S: np.ndarray, classes: int) -> np.ndarray:
    """Noisy, but leaning to bands of brightness: (K, N)."""
    rng = np.random.default_rng(1)
    cuts = np.quantile(guide_S, np.linspace(0, 1, classes + 1)[1:-1])
    owner_N = np.digitize(guide_S.ravel(), cuts)
    logits_KN = rng.normal(0, 1, (classes, owner_N.size))
    logits_KN += 1.5 * (owner_N == np.arange(classes)[:, None])
    log_KN = logits_KN - np.log(np.exp(logits_KN).sum(0))
    return np.ascontiguousarray(-np.maximum(log_KN, np.log(1e-5)), dtype=np.float32)


def two_kernels(image_CS: np.ndarray, *, position: float, value: float) -> list[Pairwise]:
    """Smoothness and appearance, as in the papers; x before y before z."""
    places_SN = np.indices(image_CS.shape[1:]).reshape(image_CS.ndim - 1, -1)[::-1]
    appearance_DN = np.concatenate(
        [places_SN / position, image_CS.reshape(len(image_CS), -1) / value]
    )
    return [
        Pairwise(features_DN=np.ascontiguousarray(f, dtype=np.float32), compatibility=w)
        for f, w in ((places_SN / 3, 3.0), (appearance_DN, 4.0))
    ]


def assert_close(prob_KN: np.ndarray, reference_KN: np.ndarray) -> None:
    """The gate: tighter would fail pydensecrf against another build of itself."""
    apart = np.abs(prob_KN - reference_KN)
    assert (prob_KN.argmax(0) == reference_KN.argmax(0)).mean() >= 0.99999
    assert np.quantile(apart, 0.999) <= 1e-4
    assert apart.max() <= 5e-3


@pytest.mark.parametrize("deviations", [(67, 3), (80, 13)])
@pytest.mark.parametrize("classes", [2, 6, 21])
@pytest.mark.parametrize("name", NAMES)
def test_real_images_are_refined_as_pydensecrf_does_it(data, name, classes, deviations):
    """A blur in another order, or vertices that pydensecrf lacks, would show in the labels."""
    pytest.importorskip("pydensecrf", reason="the extra 'crf' is not installed")
    image_SC = np.asarray(Image.open(data / NAMES[name]).convert("RGB"))[100:320, 150:378]
    kernels = two_kernels(np.moveaxis(image_SC, -1, 0), position=deviations[0], value=deviations[1])
    energy_KN = energies(image_SC.mean(-1), classes)
    assert_close(solve(energy_KN, kernels), solve(energy_KN, kernels, engine="pydensecrf"))


def guide(shape: tuple[int, ...], *, channels: int = 3) -> np.ndarray:
    """Two regions with noise, (C, *S)."""
    rng = np.random.default_rng(3)
    step_S = np.indices(shape).sum(0) > sum(shape) / 2
    return 90 + 60 * step_S + rng.normal(0, 8, (channels, *shape))


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_a_volume_is_refined_as_pydensecrf_does_it(channels):
    """Three positions, and any number of contrasts."""
    pytest.importorskip("pydensecrf", reason="the extra 'crf' is not installed")
    image_CS = guide((12, 30, 28), channels=channels)
    kernels, energy_KN = two_kernels(image_CS, position=5, value=20), energies(image_CS[0], 4)
    assert_close(solve(energy_KN, kernels), solve(energy_KN, kernels, engine="pydensecrf"))


@pytest.mark.parametrize("shape", [(24, 24), (8, 8, 8)])
def test_the_exact_gaussian_sum_is_no_further_off_than_from_pydensecrf(shape):
    """Two approximations could agree with each other and both be wrong."""
    pytest.importorskip("pydensecrf", reason="the extra 'crf' is not installed")
    image_CS = guide(shape)
    kernels, energy_KN = two_kernels(image_CS, position=6, value=20), energies(image_CS[0], 3)
    exact_KN = brute_force(energy_KN, kernels, iterations=5)
    off = {
        name: np.abs(solve(energy_KN, kernels, engine=name, iterations=5) - exact_KN).mean()
        for name in ("native", "pydensecrf")
    }
    assert off["native"] <= 1.001 * off["pydensecrf"] < 0.02


def brute_force(energy_KN, kernels, *, iterations):
    sums = []
    for kernel in kernels:
        features = kernel.features_DN.astype(float)
        square = ((features[:, :, None] - features[:, None]) ** 2).sum(0)
        weights = np.exp(-square / 2)
        norm = 1 / np.sqrt(weights.sum(1))
        sums.append(kernel.compatibility * weights * norm[:, None] * norm)
    together = sum(sums)
    q = np.exp(-energy_KN.astype(float))
    q /= q.sum(0)
    for _ in range(iterations):
        odds = np.exp(q @ together - energy_KN)
        q = odds / odds.sum(0)
    return q


def test_a_penalty_matrix_is_obeyed_as_pydensecrf_obeys_it():
    """Classes that are alike may lie side by side; a negated matrix would part them."""
    pytest.importorskip("pydensecrf", reason="the extra 'crf' is not installed")
    image_CS = guide((40, 44))
    energy_KN = energies(image_CS[0], 5)
    half = np.random.default_rng(0).uniform(0, 4, (5, 5)).astype(np.float32)
    kernels = [
        Pairwise(features_DN=k.features_DN, compatibility=half + half.T)
        for k in two_kernels(image_CS, position=9, value=20)
    ]
    assert_close(solve(energy_KN, kernels), solve(energy_KN, kernels, engine="pydensecrf"))
    weight = two_kernels(image_CS, position=9, value=20)
    matrix = [
        Pairwise(features_DN=k.features_DN, compatibility=np.float32(-k.compatibility) * np.eye(5))
        for k in weight
    ]
    assert solve(energy_KN, weight).tobytes() == solve(energy_KN, matrix).tobytes()


@pytest.mark.parametrize("classes", [2, 6, 40])
def test_neither_threads_nor_the_processor_change_a_byte(classes):
    """A run on another machine, or with other workers, would give another file."""
    from pipeline.crf import _native
    from pipeline.crf.native_engine import module_for_this_processor

    image_CS = guide((260, 300))
    kernels, energy_KN = two_kernels(image_CS, position=30, value=5), energies(image_CS[0], classes)
    seen = {solve(energy_KN, kernels, threads=n, iterations=3).tobytes() for n in (1, 2, 5)}
    if module_for_this_processor() is not _native:
        apart = 1 - np.eye(classes, dtype=np.float32)
        features = [kernel.features_DN for kernel in kernels]
        shelf, costs = _native.Shelf(0), [3 * apart, 4 * apart]
        plain = _native.mean_field(shelf, energy_KN, features, costs, [True, False], 3, 2)
        seen.add(plain.tobytes())
    assert len(seen) == 1


@pytest.mark.parametrize("dims", [2, 5])
def test_a_pixel_far_away_changes_nothing(dims):
    """Keys that wrap, as int16 ones do, would lay it on the others; 5 axes take over 64 bits."""
    rng = np.random.default_rng(2)
    near_DN = rng.uniform(0, 9, (dims, 400)).astype(np.float32)
    energy_KN = rng.uniform(0, 3, (3, 401)).astype(np.float32)
    alone = solve(energy_KN[:, :400].copy(), [Pairwise(features_DN=near_DN, compatibility=3.0)])
    for far in (65_536.0, 200_000.0):
        features_DN = np.concatenate([near_DN, np.full((dims, 1), far, np.float32)], axis=1)
        both = solve(energy_KN, [Pairwise(features_DN=features_DN, compatibility=3.0)])
        assert both[:, :400].tobytes() == alone.tobytes()


@pytest.mark.parametrize(("classes", "pixels"), list(itertools.product((1, 2, 254), (1, 3, 33))))
def test_any_number_of_classes_and_pixels_is_solved(classes, pixels):
    """Rows are padded and pixels taken in blocks: the ends are where that goes wrong."""
    features_DN = np.zeros((2, pixels), np.float32)
    energy_KN = np.zeros((classes, pixels), np.float32)
    prob_KN = solve(energy_KN, [Pairwise(features_DN=features_DN, compatibility=3.0)])
    np.testing.assert_allclose(prob_KN, 1 / classes, rtol=1e-5)


@pytest.mark.parametrize(
    ("features_DN", "message"),
    [
        (np.zeros((25, 4), np.float32), "1 to 24 features"),
        (np.array([[0, 1e12]], np.float32), "float32 can place"),
        (np.array([[0, 1e10], [0, 1]], np.float32), "float32 can place"),
        (np.array([[0, 1], [0, 8e6]], np.float32), "float32 can place"),
    ],
)
def test_what_the_lattice_cannot_address_is_refused(features_DN, message):
    """It would write beyond its arrays, or wrap."""
    energy_KN = np.zeros((2, features_DN.shape[1]), np.float32)
    with pytest.raises(CrfError, match=message):
        solve(energy_KN, [Pairwise(features_DN=features_DN, compatibility=1.0)])


STARVED = """
import resource
import numpy as np
from pipeline.crf.engine import Pairwise, engine_named

solver = engine_named("native", device="cpu", threads=4)
# Every pixel in a simplex of its own: the tables that the threads fill outgrow what is left.
features_DN = np.random.default_rng(0).random((4, 1 << 20), dtype=np.float32) * 1e4
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (400 << 20),) * 2)
try:
    energy_KN = np.zeros((3, 1 << 20), np.float32)
    solver.mean_field(energy_KN, [Pairwise(features_DN=features_DN, compatibility=1.0)],
                      iterations=1)
except MemoryError:
    print("refused")
"""


def test_threads_that_run_out_of_memory_say_so_and_the_process_lives():
    """An exception in a thread ended the worker with all its tiles, and no word why."""
    run = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "refused"), run.stderr


def test_a_kept_plan_gives_the_bytes_of_a_new_one():
    """Another image would get the lattice of the first, or weights normalised twice."""
    image_CS = guide((40, 44))
    energy_KN = energies(image_CS[0], 3)
    near, like = two_kernels(image_CS, position=9, value=20)
    moved = Pairwise(features_DN=near.features_DN + 100, compatibility=3.0, recurring=True)
    near = Pairwise(features_DN=near.features_DN, compatibility=3.0, recurring=True)
    fresh = [NativeEngine(1).mean_field(energy_KN, [k, like], iterations=5) for k in (near, moved)]
    engine = NativeEngine(1)
    for kernel, expected_KN in zip((near, moved) * 2, fresh * 2, strict=True):
        found_KN = engine.mean_field(energy_KN, [kernel, like], iterations=5)
        assert found_KN.tobytes() == expected_KN.tobytes()
    assert engine.plans_reused == 2


def test_kept_plans_stay_within_their_bytes():
    """A worker that sees many shapes would grow by each of them."""
    from pipeline.crf import _native

    shelf = _native.Shelf(200_000)
    costs, energy_KN = [1 - np.eye(2, dtype=np.float32)], np.zeros((2, 4000), np.float32)
    rows = [np.arange(8000, dtype=np.float32).reshape(2, 4000) / 50 + n for n in range(3)]
    for features_DN in (rows[0], rows[1], rows[1], rows[0]):
        _native.mean_field(shelf, energy_KN, [features_DN], costs, [True], 1, 1)
    assert shelf.found == 1


def test_only_the_places_of_a_whole_image_are_kept_for_the_next():
    """Kept for every tile of a scene they would never be met again; a hole makes them others."""
    params = CrfParams.from_mapping(
        {
            "smoothness": {"weight": 3, "position": 3},
            "appearance": {"weight": 4, "position": 9, "value": 9, "bands": ["1"], "range": [0, 9]},
        }
    ).resolve((1, 1), unit="px", channels=("1",))
    prob_KS, valid_S = np.full((2, 20, 20), 0.5, np.float32), np.ones((20, 20), bool)
    engine = NativeEngine(1)

    def reused(valid_S: np.ndarray, *, level: float = 0, row: int = 0) -> int:
        block = Block(np.full((1, 20, 20), level), valid_S)
        refine(prob_KS, block=block, origin=(row, 0), params=params, engine=engine)
        return engine.plans_reused

    assert reused(valid_S) == 0
    assert reused(valid_S, level=5) == 1
    assert [reused(valid_S, row=8) for _ in range(2)] == [1, 1]
    assert [reused(np.tri(20, dtype=bool)) for _ in range(2)] == [1, 1]
    assert reused(valid_S) == 2


def test_more_features_than_the_native_engine_takes_are_refused_by_the_plan():
    """A guide of many bands failed in every tile, after the network."""
    bands = [str(n) for n in range(23)]
    like = {"weight": 4, "position": 20, "value": 13, "range": [0, 255]}

    def check(count: int, engine: str) -> None:
        mapping = {"engine": engine, "appearance": {**like, "bands": bands[:count]}}
        crf = CrfParams.from_mapping(mapping).resolve((1, 1), unit="px", channels=bands)
        crf.check_extent((500, 500))

    check(22, "native")
    check(23, "torch")
    with pytest.raises(CrfError, match="25 axes and bands, the native engine takes 24"):
        check(23, "native")


def test_no_engine_outlives_the_process() -> None:
    """Every end of a run would print that the engine leaked, as if memory were lost."""
    code = """
import ctypes
from pipeline.crf.engine import engine_named
engine_named("native", device="cpu", threads=1)
ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine_named))  # as what is never collected does
"""
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert ended.stderr == b""
