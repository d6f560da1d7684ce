"""Small images that the torch engine refines in one call: each as by itself, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.crf import torch_engine
from pipeline.crf.dense import Unrefined, refine, refine_each
from pipeline.crf.engine import Engine, EngineName, engine_named, installed
from pipeline.crf.params import CrfParams
from pipeline.crf.torch_engine import MOST_CACHED, TorchEngine
from pipeline.ports import Block

BANDS = ("red", "green")
PLANE = st.tuples(st.integers(1, 60), st.integers(1, 60))
VOLUME = st.tuples(st.integers(1, 9), st.integers(1, 14), st.integers(1, 14))


def crf(classes: int, *, matrix: bool = False, weight: float = 5, value: float = 9) -> CrfParams:
    apart = [[float(min(abs(i - j), 3)) for j in range(classes)] for i in range(classes)]
    return CrfParams.from_mapping(
        {
            "engine": "torch",
            "iterations": 4,
            "smoothness": {"weight": 3, "position": 2},
            "appearance": {
                "weight": weight, "position": 20, "value": value, "bands": BANDS, "range": [0, 255]
            },
            **({"compatibility": apart} if matrix else {}),
        }
    )  # fmt: skip


def image(
    shape: tuple[int, ...], params: CrfParams, *, classes: int, seed: int, valid: float = 1
) -> Unrefined:
    """Noise over hills, of which a share is valid; two in three are sure of their classes."""
    rng = np.random.default_rng(seed)
    hills_S = 120 + 80 * np.sin(np.indices(shape).sum(0) / 9 + seed)
    image_CS = (hills_S + rng.normal(0, 6, (2, *shape))).clip(0, 255).astype(np.uint8)
    prob_KS = np.moveaxis(rng.dirichlet(np.full(classes, 0.1 if seed % 3 else 50), shape), -1, 0)
    return Unrefined(
        prob_KS=prob_KS,
        block=Block(image_CS, rng.random(shape) < valid),
        origin=(0,) * len(shape),
        params=params.resolve((1.0,) * len(shape), unit="px", channels=BANDS),
    )


def alone(images: list[Unrefined], engine: Engine) -> list[bytes]:
    return [
        refine(
            one.prob_KS, block=one.block, origin=one.origin, params=one.params, engine=engine
        ).tobytes()
        for one in images
    ]


def together(images: list[Unrefined], engine: Engine) -> list[bytes]:
    return [found_KS.tobytes() for found_KS in refine_each(images, engine=engine)]


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(PLANE | VOLUME, min_size=2, max_size=9),
    valid=st.sampled_from([(1.0,), (0.7, 0.0, 1.0), (0.02, 1.0)]),
    classes=st.sampled_from([1, 2, 6, 21]),
    matrix=st.booleans(),
    weight=st.sampled_from([5.0, 300.0]),
    threads=st.sampled_from([1, 2]),
)
def test_images_in_one_call_are_refined_as_each_by_itself(
    shapes, valid, classes, matrix, weight, threads
):
    """One would leak into another, or another list of images would choose another CRF.

    A weight of 300 gives logits whose exp float32 does not hold, in some images and not in others.
    """
    params = crf(classes, matrix=matrix, weight=weight)
    images = [
        image(shape, params, classes=classes, seed=seed, valid=valid[seed % len(valid)])
        for seed, shape in enumerate(shapes)
    ]
    engine = TorchEngine(device="cpu", threads=threads)
    assert together(images, engine) == alone(images, TorchEngine(device="cpu", threads=1))


@pytest.mark.parametrize("classes", [2, 21])
@pytest.mark.parametrize("matrix", [False, True], ids=["potts", "matrix"])
def test_many_crops_take_few_calls_and_a_large_one_its_own(classes, matrix, monkeypatch):
    """They would be refined one by one after all, or a call would take all memory there is."""
    params = crf(classes, matrix=matrix)
    sides = [64] * 20 + [300] + [40] * 3
    images = [
        image((side, side), params, classes=classes, seed=seed) for seed, side in enumerate(sides)
    ]
    wanted, calls = alone(images, TorchEngine(device="cpu", threads=1)), []
    computed = TorchEngine._mean_field

    def counted(self: TorchEngine, problem, sizes, **rest):
        calls.append(sizes)
        return computed(self, problem, sizes, **rest)

    monkeypatch.setattr(TorchEngine, "_mean_field", counted)
    assert together(images, TorchEngine(device="cpu", threads=2)) == wanted
    assert calls == [[64 * 64] * 16, [64 * 64] * 4, [300 * 300], [40 * 40] * 3]
    assert sum(calls[0]) == MOST_CACHED


def test_images_whose_vertices_64_bits_do_not_number_are_refined_one_by_one(monkeypatch):
    """Examples that are fine by themselves would be refused because of their number."""
    params = crf(3, value=0.0016)
    images = [image((6, 7), params, classes=3, seed=seed) for seed in range(20)]
    calls: list[int] = []
    built = torch_engine.simplices
    monkeypatch.setattr(torch_engine, "simplices", lambda f: calls.append(f.shape[1]) or built(f))
    found = together(images, TorchEngine(device="cpu", threads=1))
    assert calls == [20 * 42] * 2 + [42] * 21  # places are kept after the first
    assert found == alone(images, TorchEngine(device="cpu", threads=1))


@pytest.mark.parametrize("name", ["native", "pydensecrf"])
def test_other_engines_take_images_one_after_the_other(name: EngineName):
    """A list of examples would not run by them, or change its order."""
    if not installed(name):
        pytest.skip(f"the CRF engine {name} is not installed here")
    params, engine = crf(4), engine_named(name, device="cpu", threads=1)
    images = [image((9, 8 + 4 * n), params, classes=4, seed=n, valid=n % 3) for n in range(5)]
    assert together(images, engine) == alone(images, engine)
    assert len({len(found) for found in together(images, engine)}) == 5
