"""What the ``crf`` part can say: presets, any kernels, guides of several bands, compatibilities."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.crf.dense import refine
from pipeline.crf.engine import engine_named
from pipeline.crf.params import CrfParams, ResolvedCrf
from pipeline.errors import CrfError
from pipeline.ports import Block

RGB = ("red", "green", "blue")
APPEARANCE = {"weight": 4, "position": 20, "value": 13, "bands": RGB, "range": [0, 255]}
SMOOTHNESS = {"weight": 3, "position": 3}
POTTS = [[0, 1, 1], [1, 0, 1], [1, 1, 0]]


def read(**crf: object) -> CrfParams:
    return CrfParams.from_mapping(crf)


def resolved(shape: tuple[int, ...], channels: tuple[str, ...] = RGB, **crf: object) -> ResolvedCrf:
    return read(**crf).resolve((1.0,) * len(shape), unit="px", channels=channels)


def scene(shape: tuple[int, ...], *, classes: int, bands: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Stripes of grey with noise (float32), and weak probabilities that follow them."""
    rng = np.random.default_rng(11)
    owner_S = np.indices(shape).sum(0) // 5 % classes
    level_KC = rng.uniform(40, 200, (classes, bands))
    image_CS = np.moveaxis(level_KC[owner_S], -1, 0) + rng.normal(0, 6, (bands, *shape))
    odds_KS = np.exp(rng.normal(0, 1, (classes, *shape)))
    odds_KS[owner_S, *np.indices(shape)] *= 3
    return (odds_KS / odds_KS.sum(0)).astype(np.float32), image_CS.astype(np.float32)


def run(prob_KS: np.ndarray, guide_CS: np.ndarray, params: ResolvedCrf) -> np.ndarray:
    shape = prob_KS.shape[1:]
    return refine(
        prob_KS,
        block=Block(guide_CS, np.ones(shape, bool)),
        origin=(0,) * len(shape),
        params=params,
        engine=engine_named("pydensecrf", device="cpu", threads=1),
    )


def test_a_list_of_kernels_says_the_same_as_the_two_short_names():
    """A bundle rewritten in the long form would become another model."""
    assert read(kernels=[SMOOTHNESS, APPEARANCE]) == read(
        smoothness=SMOOTHNESS, appearance=APPEARANCE
    )


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("v1", (3, 3, 5, 50, 10)),
        ("v1-msc", (3, 3, 3, 95, 3)),
        ("v2-vgg", (2, 2, 4, 65, 3)),
        ("v2-resnet101", (3, 1, 4, 67, 3)),
    ],
)
def test_a_preset_is_the_energy_of_its_paper(name, figures):
    """A published model would be refined by another energy than its authors'."""
    smooth, near, weight, position, value = figures
    spelt = read(
        iterations=10,
        smoothness={"weight": smooth, "position": near},
        appearance={**APPEARANCE, "weight": weight, "position": position, "value": value},
    )
    assert read(preset=name, bands=RGB, range=[0, 255]) == spelt


@pytest.mark.parametrize(
    ("crf", "message"),
    [
        ({"preset": "v3", "bands": RGB, "range": [0, 1]}, "v1, v1-msc, v2-vgg, v2-resnet101"),
        ({"preset": "v1"}, "bands, range missing"),
        ({"preset": "v1", "bands": RGB, "range": [0, 1], "smoothness": SMOOTHNESS}, "unknown smoo"),
        ({"kernels": [SMOOTHNESS], "smoothness": SMOOTHNESS}, "unknown smoothness"),
        ({"kernels": []}, "a list of kernels"),
        ({"kernels": [SMOOTHNESS, 3]}, r"crf\.kernels\[1\]: a mapping"),
        ({"kernels": [{**APPEARANCE, "weight": 0}]}, r"kernels\[0\]\.weight: a number above 0"),
        ({"appearance": {**APPEARANCE, "value": [3, 3]}}, "2 given for 3 bands"),
        ({"appearance": {**APPEARANCE, "range": [[0, 1], [0, 2]]}}, "2 given for 3 bands"),
        ({"appearance": {**APPEARANCE, "range": [[0, 1], [0, 2], [2, 0]]}}, "below high"),
        ({"smoothness": SMOOTHNESS, "compatibility": [[0, 1], [0.5, 0]]}, "symmetric"),
        ({"smoothness": SMOOTHNESS, "compatibility": [[0, 1]]}, "as many columns as rows"),
        ({"smoothness": SMOOTHNESS, "compatibility": 1}, "a list of rows"),
        ({"smoothness": SMOOTHNESS, "compatibility": [[0, 1e38], [1e38, 0]]}, "at most 1e.12"),
        ({"smoothness": {**SMOOTHNESS, "weight": 1e39}}, "smoothness.weight: .* at most 1e.12"),
    ],
)
def test_what_cannot_be_an_energy_is_refused_in_one_line_that_names_it(crf, message):
    """Two ways to say one thing in one file, or half a matrix, would leave one of them out."""
    with pytest.raises(CrfError, match=message) as error:
        read(**crf)
    assert "\n" not in str(error.value)


def test_each_guide_band_has_its_own_deviation_and_range():
    """One number for a band in reflectances and one in degrees would drown one of them."""
    prob_KS, image_CS = scene((24, 25), classes=3)
    scaled_CS = image_CS * np.float32([1, 10, 1]).reshape(3, 1, 1)
    one = resolved((24, 25), appearance=APPEARANCE)
    each = resolved((24, 25), appearance={**APPEARANCE, "range": [[0, 255], [0, 2550], [0, 255]]})
    np.testing.assert_allclose(
        run(prob_KS, scaled_CS, each), run(prob_KS, image_CS, one), atol=1e-4
    )
    halved_CS = image_CS / np.float32([1, 2, 1]).reshape(3, 1, 1)
    wider = resolved((24, 25), appearance={**APPEARANCE, "value": [13, 6.5, 13]})
    np.testing.assert_allclose(
        run(prob_KS, halved_CS, wider), run(prob_KS, image_CS, one), atol=1e-4
    )
    assert np.abs(run(prob_KS, halved_CS, one) - run(prob_KS, image_CS, one)).max() > 0.05


def test_three_kernels_are_all_in_the_sum():
    """Only the two first kernels would count."""
    prob_KS, image_CS = scene((24, 25), classes=3)
    three = [SMOOTHNESS, APPEARANCE, {"weight": 3, "position": [6, 1]}]
    sums = [run(prob_KS, image_CS, resolved((24, 25), kernels=three[:n])) for n in (2, 3)]
    assert np.abs(sums[0] - sums[1]).max() > 0.05


def test_potts_written_out_is_potts():
    """The sign or the weight of a matrix would be another one than that of the short form."""
    prob_KS, image_CS = scene((24, 25), classes=3)
    energy = {"smoothness": SMOOTHNESS, "appearance": APPEARANCE}
    short = run(prob_KS, image_CS, resolved((24, 25), **energy))
    written = run(prob_KS, image_CS, resolved((24, 25), **energy, compatibility=POTTS))
    np.testing.assert_allclose(written, short, atol=1e-4)


def test_a_matrix_of_another_number_of_classes_is_refused():
    """The extension would read past the matrix."""
    prob_KS, image_CS = scene((12, 12), classes=4)
    with pytest.raises(CrfError, match="3 rows, there are 4 classes"):
        run(prob_KS, image_CS, resolved((12, 12), smoothness=SMOOTHNESS, compatibility=POTTS))


def test_two_hundred_and_fifty_four_classes_are_refined():
    """All class ids that a byte holds beside nodata must be usable."""
    prob_KS, image_CS = scene((20, 24), classes=254)
    strong = {"weight": 100, "position": 3}  # each class has but a few pixels to vote for it
    refined = run(prob_KS, image_CS, resolved((20, 24), smoothness=strong))
    np.testing.assert_allclose(refined.sum(0), 1, atol=1e-4)
    changed = refined.argmax(0) != prob_KS.argmax(0)
    assert 0.05 < changed.mean() < 1


@pytest.mark.parametrize(("classes", "contrasts"), [(3, 4), (18, 2)])
def test_volumes_with_thick_slices_and_several_contrasts_are_refined_as_pydensecrf_does(
    classes, contrasts
):
    """An axis whose deviation is another's, or a contrast left out, shows in every slice."""
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    utils = pytest.importorskip("pydensecrf.utils")
    prob_KS, image_CS = scene((7, 22, 25), classes=classes, bands=contrasts)
    names = ("t1", "t2", "flair", "dwi")[:contrasts]
    deviations = [9.0, 14.0, 20.0, 30.0][:contrasts]
    kernels = [
        {"weight": 3, "position_mm": 3},
        {
            "weight": 5, "position_mm": [17, 12, 10], "value": deviations, "bands": names,
            "range": [0, 255],
        },
    ]  # fmt: skip
    params = read(kernels=kernels).resolve((5, 1, 0.8), unit="mm", channels=names)
    backwards = (0, 3, 2, 1)  # the reference's feature order is that of the array's axes: x, y, z
    shape = prob_KS.shape[:0:-1]
    field = densecrf.DenseCRF(prob_KS[0].size, classes)
    energy_KS = -np.log(prob_KS.transpose(backwards))
    field.setUnaryEnergy(np.ascontiguousarray(energy_KS.reshape(classes, -1)))
    near = utils.create_pairwise_gaussian(sdims=(3 / 0.8, 3, 3 / 5), shape=shape)
    field.addPairwiseEnergy(near, compat=3)
    likeness = utils.create_pairwise_bilateral(
        sdims=(10 / 0.8, 12, 17 / 5), schan=deviations, chdim=0,
        img=image_CS.clip(0, 255).transpose(backwards),
    )  # fmt: skip
    field.addPairwiseEnergy(likeness, compat=5)
    wanted = np.asarray(field.inference(10)).reshape(classes, *shape).transpose(backwards)
    refined = run(prob_KS, image_CS, params)
    np.testing.assert_allclose(refined, wanted, atol=5e-3)
    assert (refined.argmax(0) == wanted.argmax(0)).mean() >= 0.9999
    assert (refined.argmax(0) != prob_KS.argmax(0)).mean() > 0.05
