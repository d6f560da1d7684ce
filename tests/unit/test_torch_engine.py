"""The torch engine against pydensecrf: same lattice, same sums, whatever the energy."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from pipeline.crf import torch_engine
from pipeline.crf.engine import Pairwise, engine_named, pick_engine
from pipeline.crf.params import CrfParams
from pipeline.crf.torch_engine import TorchEngine
from pipeline.errors import CrfError

reference = pytest.importorskip("pydensecrf.densecrf", reason="the extra 'crf' is not installed")


def engine_on(threads: int = 1):
    return engine_named("torch", device="cpu", threads=threads)


def problem(
    shape: tuple[int, ...], *, classes: int, deviations: Sequence[float], values: Sequence[float]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Energies, and features by place alone and by place and noisy stripes; N is a multiple of 4.

    The reference fills the last four pixels up with one at feature 0, which adds vertices.
    """
    rng = np.random.default_rng(1)
    assert np.prod(shape) % 4 == 0
    owner_N = (np.indices(shape).sum(0) // 6 % classes).ravel()
    odds_KN = np.exp(rng.normal(0, 1.2, (classes, owner_N.size)))
    odds_KN[owner_N, np.arange(owner_N.size)] *= 3
    energy_KN = -np.log(odds_KN / odds_KN.sum(0)).astype(np.float32)
    level = rng.uniform(30, 220, (classes, len(values)))
    guide_CN = level[owner_N].T + rng.normal(0, 9, (len(values), owner_N.size))
    place_SN = np.indices(shape).reshape(len(shape), -1)[::-1]
    near_DN = (place_SN / 3).astype(np.float32)
    rows = [
        *(place_SN / np.reshape(deviations, (-1, 1))),
        *(guide_CN / np.reshape(values, (-1, 1))),
    ]
    return energy_KN, [near_DN, np.stack(rows).astype(np.float32)]


def both(energy_KN: np.ndarray, kernels: list[Pairwise]) -> tuple[np.ndarray, np.ndarray]:
    engines = [engine_on(), engine_named("pydensecrf", device="cpu", threads=1)]
    found, wanted = (e.mean_field(energy_KN, kernels, iterations=10) for e in engines)
    assert found.shape == wanted.shape == energy_KN.shape
    assert found.dtype == np.float32
    return found, wanted


def assert_equal(found_KN: np.ndarray, wanted_KN: np.ndarray) -> None:
    """Rounding ties may add or drop a vertex, as another build of the reference does."""
    apart = np.abs(found_KN - wanted_KN)
    assert np.quantile(apart, 0.999) <= 1e-4
    assert apart.max() <= 5e-3
    assert (found_KN.argmax(0) == wanted_KN.argmax(0)).mean() >= 0.99999


@pytest.mark.parametrize(
    ("shape", "deviations", "values"),
    [
        ((96, 80), (67, 67), (3, 3, 3)),
        ((96, 80), (80, 80), (13, 13, 13)),
        ((96, 80), (20, 9), (10,)),
        ((12, 26, 20), (12, 10, 3), (20,)),
        ((8, 24, 20), (12, 10, 3), (20, 9, 14, 30)),
        ((8, 24, 20), (12, 10, 3), (2, 4, 6, 4)),
    ],
)
@pytest.mark.parametrize("classes", [2, 6, 21])
def test_probabilities_are_those_of_pydensecrf(shape, deviations, values, classes):
    """A vertex rounded elsewhere, a blur axis swapped or a norm left out would show everywhere."""
    energy_KN, (near, like) = problem(shape, classes=classes, deviations=deviations, values=values)
    kernels = [
        Pairwise(features_DN=near, compatibility=3.0),
        Pairwise(features_DN=like, compatibility=4.0),
    ]
    found_KN, wanted_KN = both(energy_KN, kernels)
    assert_equal(found_KN, wanted_KN)
    assert (found_KN.argmax(0) != energy_KN.argmin(0)).mean() > 0.03


def test_a_compatibility_matrix_is_that_of_pydensecrf(monkeypatch):
    """The class left out of the sums, or the transposed matrix, would be charged wrongly."""
    energy_KN, (near, like) = problem((60, 64), classes=4, deviations=(9, 9), values=(9, 9))
    cost_KK = np.random.default_rng(2).uniform(-0.3, 1, (4, 4)).astype(np.float32)
    cost_KK += cost_KK.T
    kernels = [
        Pairwise(features_DN=near, compatibility=cost_KK),
        Pairwise(features_DN=like, compatibility=2.0),
    ]
    found_KN, wanted_KN = both(energy_KN, kernels)
    assert_equal(found_KN, wanted_KN)
    monkeypatch.setattr(torch_engine, "_MOST_MIXED", 40)
    assert np.array_equal(both(energy_KN, kernels)[0], found_KN), "in parts"


def test_scores_that_leave_no_doubt_do_not_overflow():
    """An exp of the logits as they are would be infinite, and its share of the sum NaN."""
    energy_KN, (near, _) = problem((40, 36), classes=3, deviations=(9, 9), values=(9,))
    found_KN, wanted_KN = both(60 * energy_KN, [Pairwise(features_DN=near, compatibility=3.0)])
    assert (60 * np.ptp(energy_KN, axis=0)).max() > 100
    assert_equal(found_KN, wanted_KN)


@pytest.mark.parametrize(("classes", "pixels"), [(1, 5), (2, 1), (254, 40)])
def test_any_number_of_classes_and_pixels_is_computed(classes, pixels):
    """A tile with one valid pixel, or a class id for each byte, would break the sums."""
    energy_KN = np.random.default_rng(0).uniform(0, 9, (classes, pixels)).astype(np.float32)
    features = np.arange(2 * pixels, dtype=np.float32).reshape(2, -1)
    kernels = [Pairwise(features_DN=features, compatibility=3.0)]
    found_KN = engine_on().mean_field(energy_KN, kernels, iterations=3)
    np.testing.assert_allclose(found_KN.sum(0), 1, atol=1e-5)
    assert np.isfinite(found_KN).all()


def test_the_bytes_do_not_depend_on_threads_nor_on_who_else_computes():
    """A resume with another number of workers would leave another mask than one run."""
    energy_KN, (near, like) = problem((96, 80), classes=6, deviations=(67, 67), values=(3, 3, 3))
    kernels = [Pairwise(features_DN=f, compatibility=3.0) for f in (near, like)]
    results: list[bytes] = []

    def compute(threads: int) -> None:
        found = engine_on(threads).mean_field(energy_KN, kernels, iterations=5)
        results.append(found.tobytes())

    others = [threading.Thread(target=compute, args=(n,)) for n in (1, 2, 3)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    compute(1)
    assert len(results) == 4
    assert len(set(results)) == 1


def test_the_lattice_of_places_is_built_once_for_images_of_a_shape(monkeypatch):
    """Another image would get the lattice of the first, or weights normalised twice."""
    energy_KN, (near, like) = problem((40, 36), classes=3, deviations=(9, 9), values=(9,))
    places = [
        Pairwise(features_DN=features, compatibility=3.0, recurring=True)
        for features in (near, near + 100)
    ]
    guided = Pairwise(features_DN=like, compatibility=4.0)
    fresh = [
        TorchEngine(device="cpu", threads=1).mean_field(energy_KN, [place, guided], iterations=5)
        for place in places
    ]
    built: list[int] = []
    simplices = torch_engine.simplices
    monkeypatch.setattr(torch_engine, "simplices", lambda f: built.append(len(f)) or simplices(f))
    engine = TorchEngine(device="cpu", threads=1)
    for turn in (0, 0, 1, 1, 0):
        again = replace(places[turn], features_DN=places[turn].features_DN.copy())
        found_KN = engine.mean_field(energy_KN, [again, guided], iterations=5)
        assert found_KN.tobytes() == fresh[turn].tobytes()
    assert built == [2, 3, 3, 2, 3, 3, 2, 3]
    monkeypatch.setattr(torch_engine, "MOST_KEPT_BYTES", 1000)
    small = TorchEngine(device="cpu", threads=1)
    for _ in range(2):
        small.mean_field(energy_KN, [places[0]], iterations=1)
    assert built[8:] == [2, 2]


def test_a_place_far_from_the_scenes_corner_is_computed_and_one_too_far_is_refused():
    """The reference's keys wrap at 32,767: what lies 65,536 px away would be a neighbour."""
    energy_KN = np.float32([[0.7, 4, 4, 4], [0.7, 0, 0, 0]])

    def first(distance: float) -> float:
        features = np.zeros((2, 4), np.float32)
        features[1, 1:] = distance
        kernels = [Pairwise(features_DN=features, compatibility=3.0)]
        return float(engine_on().mean_field(energy_KN, kernels, iterations=5)[0, 0])

    assert first(1) < 0.4
    assert first(65_536) == pytest.approx(0.5, abs=1e-6)
    wide = np.zeros((6, 4), np.float32)
    wide[:, 1] = 1e5
    with pytest.raises(CrfError, match="64 bits"):
        engine_on().mean_field(
            energy_KN, [Pairwise(features_DN=wide, compatibility=3.0)], iterations=1
        )


def test_a_crf_asks_for_the_engine_by_name():
    """A bundle that was tuned with one engine would be run by another, without a word."""
    params = CrfParams.from_mapping({"engine": "torch", "smoothness": {"weight": 3, "position": 1}})
    crf = params.resolve((1, 1), unit="px", channels=("1",))
    crf.check_extent((200_000, 200_000))
    assert pick_engine(crf.engine, device="cpu") == "torch"
    assert pick_engine("auto", device="cuda") == "torch"
