"""The dense CRF against brute force, against pydensecrf's own 2-D wrapper, and at its edges."""

from __future__ import annotations

import copy
import sys
import threading

import numpy as np
import pytest

from pipeline.crf.dense import refine
from pipeline.crf.engine import engine_named, installed, pick_engine
from pipeline.crf.params import CrfParams, ResolvedCrf
from pipeline.errors import CrfError
from pipeline.ports import Block

densecrf = pytest.importorskip("pydensecrf.densecrf", reason="the extra 'crf' is not installed")

ENGINE = {"name": "native"}
RGB = ("red", "green", "blue")
MAPPING = {
    "iterations": 10,
    "smoothness": {"weight": 3, "position": 3},
    "appearance": {"weight": 4, "position": 20, "value": 13, "bands": RGB, "range": [0, 255]},
}


def resolved(*, spacing: tuple[float, ...] = (1.0, 1.0), **changes: object) -> ResolvedCrf:
    mapping = {**MAPPING, "engine": "pydensecrf", **changes}
    return CrfParams.from_mapping(mapping).resolve(spacing, unit="px", channels=RGB)


def scene(shape: tuple[int, ...], *, classes: int = 4, seed: int = 5) -> tuple[np.ndarray, ...]:
    """Blobs of colour with noise (uint8), and probabilities that agree with them half the time."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, 1, (9, len(shape))) * np.array(shape)
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    owner_S = ((places[..., None, :] - centres) ** 2).sum(-1).argmin(-1)
    colour = rng.integers(30, 225, (9, 3))
    noise = rng.normal(0, 8, (3, *shape))
    image_CS = np.clip(np.moveaxis(colour[owner_S], -1, 0) + noise, 0, 255).astype(np.uint8)
    logits_KS = rng.normal(0, 1.5, (classes, *shape))
    logits_KS += 1.5 * (owner_S % classes == np.arange(classes).reshape(-1, *(1,) * len(shape)))
    odds_KS = np.exp(logits_KS)
    return (odds_KS / odds_KS.sum(0)).astype(np.float32), image_CS


@pytest.fixture(params=["native", "torch", "pydensecrf"], autouse=True)
def engine(request, monkeypatch):
    """What holds for the CRF holds for each engine."""
    if not installed(request.param):
        pytest.skip(f"the CRF engine {request.param} is not installed")
    monkeypatch.setitem(ENGINE, "name", request.param)


def run(prob_KS: np.ndarray, image_CS: np.ndarray, **changes: object) -> np.ndarray:
    valid_S = changes.pop("valid_S", np.ones(prob_KS.shape[1:], bool))
    arguments = {
        "block": Block(image_CS, valid_S),
        "origin": (0,) * (prob_KS.ndim - 1),
        "params": resolved(spacing=(1.0,) * (prob_KS.ndim - 1)),
        "engine": engine_named(ENGINE["name"], device="cpu", threads=1),
    }
    return refine(prob_KS, **{**arguments, **changes})


def brute_force(prob_KS: np.ndarray, image_CS: np.ndarray, params: ResolvedCrf) -> np.ndarray:
    """Mean field with exact Gaussian kernels over all pairs of pixels, in float64."""
    classes, *shape = prob_KS.shape
    unary_KN = np.log(np.clip(prob_KS.reshape(classes, -1).astype(float), 1e-5, 1))
    places_SN = np.indices(shape).reshape(len(shape), -1)
    kernels = []
    for kernel in params.kernels:
        rows = [axis / dev for axis, dev in zip(places_SN, kernel.position_px, strict=True)]
        if kernel.guide is not None:
            bands = zip(kernel.channels, kernel.guide.value, strict=True)
            rows += [image_CS[c].ravel() / value for c, value in bands]
        features = np.stack(rows, 1)
        square = ((features[:, None] - features[None]) ** 2).sum(-1)
        weights = np.exp(-square / 2)
        norm = 1 / np.sqrt(weights.sum(1))
        kernels.append(kernel.weight * weights * norm[:, None] * norm)
    cost_KK = -np.eye(classes) if params.compatibility is None else np.array(params.compatibility)
    q = np.exp(unary_KN) / np.exp(unary_KN).sum(0)
    for _ in range(params.iterations):
        energy = unary_KN - cost_KK @ sum(q @ k for k in kernels)
        odds = np.exp(energy - energy.max(0))
        q = odds / odds.sum(0)
    return q.reshape(prob_KS.shape)


@pytest.mark.parametrize(("shape", "position"), [((36, 40), 8), ((8, 14, 13), [2, 4, 4])])
def test_mean_field_follows_the_exact_gaussian_sum(shape, position):
    """A wrong feature, scale, sign or normalisation would move most of the pixels.

    The lattice is an approximation: here it comes within 4e-3 in the mean, labels equal for 997 in
    1000; a kernel left out costs 3e-2 or more, weights 1.3 times too large 1.9e-2.
    """
    prob_KS, image_CS = scene(shape, classes=3)
    appearance = {**MAPPING["appearance"], "position": position, "value": 30}
    smoothness = {"weight": 2, "position": 2}
    params = resolved(
        spacing=(1.0,) * len(shape), appearance=appearance, smoothness=smoothness, iterations=3
    )
    exact = brute_force(prob_KS, image_CS, params)
    refined = run(prob_KS, image_CS, params=params)
    assert np.abs(refined - exact).mean() < 0.01
    assert (refined.argmax(0) == exact.argmax(0)).mean() > 0.99
    assert (prob_KS.argmax(0) == exact.argmax(0)).mean() < 0.9


def test_a_compatibility_matrix_costs_what_it_says():
    """A matrix that is transposed, negated or left out would favour the wrong neighbours."""
    prob_KS, image_CS = scene((30, 31), classes=3)
    near, far = [[0, 0.2, 1], [0.2, 0, 1], [1, 1, 0]], [[0, 1, 1], [1, 0, 0.2], [1, 0.2, 0]]
    params = [resolved(iterations=3, compatibility=matrix) for matrix in (near, far)]
    refined = [run(prob_KS, image_CS, params=one) for one in params]
    for one, found in zip(params, refined, strict=True):
        exact = brute_force(prob_KS, image_CS, one)
        assert np.abs(found - exact).mean() < 0.01
    assert np.abs(refined[0] - refined[1]).mean() > 0.05


def test_a_uint8_rgb_scene_is_refined_as_pydensecrf_does_it_itself():
    """Axis order, scaling or unary other than the reference's would change its labels."""
    prob_KS, image_CS = scene((61, 75))
    reference = densecrf.DenseCRF2D(75, 61, 4)
    reference.setUnaryEnergy(-np.log(np.clip(prob_KS, 1e-5, 1)).reshape(4, -1))
    reference.addPairwiseGaussian(sxy=3, compat=3)
    rgb = np.ascontiguousarray(np.moveaxis(image_CS, 0, -1))
    reference.addPairwiseBilateral(sxy=20, srgb=13, rgbim=rgb, compat=4)
    expected = np.asarray(reference.inference(10)).reshape(prob_KS.shape)
    refined = run(prob_KS, image_CS)
    np.testing.assert_array_equal(refined.argmax(0), expected.argmax(0))
    np.testing.assert_allclose(refined, expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(90, 84), (11, 30, 28)])
def test_a_tile_is_the_scene_with_everything_else_left_out(shape):
    """Features in tile coordinates would shift the lattice from tile to tile."""
    prob_KS, image_CS = scene(shape)
    start = tuple(n // 3 for n in shape)
    inside = (slice(None), *(slice(a, n) for a, n in zip(start, shape, strict=True)))
    valid_S = np.zeros(shape, bool)
    valid_S[inside[1:]] = True
    whole = run(prob_KS, image_CS, valid_S=valid_S)
    tile = run(prob_KS[inside], image_CS[inside], origin=start)
    assert whole[inside].tobytes() == tile.tobytes()
    elsewhere = run(prob_KS[inside], image_CS[inside])
    assert np.abs(elsewhere - tile).max() > 1e-3


def test_with_scene_coordinates_a_tile_agrees_with_the_scene_far_from_its_seam():
    """At the tile's own origin the lattice differs everywhere, so no halo could ever help."""
    prob_KS, image_CS = scene((60, 240))
    appearance = {**MAPPING["appearance"], "position": 6}
    params = resolved(appearance=appearance, iterations=3)
    whole = run(prob_KS, image_CS, params=params)[:, :, 161:]
    half = (slice(None), slice(None), slice(80, None))
    there = run(prob_KS[half], image_CS[half], origin=(0, 80), params=params)[:, :, 81:]
    here = run(prob_KS[half], image_CS[half], params=params)[:, :, 81:]
    assert np.abs(there - whole).max() < 1e-4
    assert np.abs(here - whole).max() > 1e-2


def test_invalid_pixels_neither_change_nor_influence_the_others():
    """Nodata values in the guide or the scores would bleed into the field beside them."""
    prob_KS, image_CS = scene((40, 41))
    valid_S = np.random.default_rng(0).random((40, 41)) > 0.3
    refined = run(prob_KS, image_CS, valid_S=valid_S)
    other_prob, other_image = prob_KS.copy(), image_CS.astype(np.float64)
    other_prob[:, ~valid_S] = np.nan
    other_image[:, ~valid_S] = np.nan
    again = run(other_prob, other_image, valid_S=valid_S)
    assert refined[:, valid_S].tobytes() == again[:, valid_S].tobytes()
    assert refined[:, ~valid_S].tobytes() == prob_KS[:, ~valid_S].tobytes()
    assert np.abs(refined - prob_KS)[:, valid_S].max() > 0.1


def test_guide_values_are_scaled_from_their_range_and_clipped():
    """A 16-bit guide would otherwise be thousands of deviations wide, and overflow the keys."""
    prob_KS, image_CS = scene((30, 30))
    wide = {**MAPPING["appearance"], "range": [1000, 1000 + 255 * 16]}
    reflectance = 1000 + image_CS.astype(np.uint16) * 16
    expected = run(prob_KS, image_CS)
    refined = run(prob_KS, reflectance, params=resolved(appearance=wide))
    np.testing.assert_allclose(refined, expected, atol=1e-5)
    half = {**MAPPING["appearance"], "range": [0, 100]}
    clipped = run(prob_KS, np.minimum(image_CS, 100), params=resolved(appearance=half))
    assert run(prob_KS, image_CS, params=resolved(appearance=half)).tobytes() == clipped.tobytes()


def test_anisotropic_spacing_makes_the_kernel_as_wide_in_millimetres_on_every_axis():
    """A deviation in mm taken as voxels would smooth five times too far across thick slices."""
    mapping = {"iterations": 5, "smoothness": {"weight": 3, "position_mm": 4}}
    params = CrfParams.from_mapping(mapping).resolve((5, 1, 2), unit="mm", channels=("ct",))
    assert params.kernels[0].position_px == (0.8, 4.0, 2.0)
    assert params.halo_px.before == params.halo_px.after == (2, 8, 4)
    prob_KS = np.full((2, 9, 21, 15), 0.5, np.float32)
    prob_KS[:, 4, 10, 7] = 0.999, 0.001
    refined = run(prob_KS, np.zeros((1, 9, 21, 15), np.int16), params=params)
    gain = refined[0] - 0.5
    assert gain[4, 14, 7] > gain[8, 10, 7] + 1e-4
    assert gain[4, 14, 7] == pytest.approx(gain[4, 10, 9], rel=0.5)


def test_the_same_call_gives_the_same_bytes_in_any_thread():
    """A result that depends on scheduling would break the promise of equal bytes."""
    prob_KS, image_CS = scene((64, 64), classes=6)
    results: list[bytes] = []
    work = lambda: results.append(run(prob_KS, image_CS).tobytes())  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work()
    assert len(results) == 4
    assert len(set(results)) == 1


@pytest.mark.parametrize("pixels", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_any_number_of_pixels_and_classes_is_refined(pixels, classes):
    """A tile with a pixel or two of data, or a one-class model, would crash the extension."""
    prob_KS = np.full((classes, 2, 4), 1 / classes, np.float32)
    valid_S = np.arange(8).reshape(2, 4) < pixels
    refined = run(prob_KS, np.full((3, 2, 4), 7, np.uint8), valid_S=valid_S)
    assert refined is not prob_KS
    np.testing.assert_allclose(refined, prob_KS, atol=1e-5)


def test_the_input_is_not_changed_and_the_output_is_c_ordered_float32():
    """A caller that keeps the network's scores would store refined ones."""
    prob_KS, image_CS = scene((20, 21))
    fortran = np.asfortranarray(prob_KS, dtype=np.float64)
    before = fortran.copy()
    refined = run(fortran, image_CS)
    np.testing.assert_array_equal(fortran, before)
    assert refined.dtype == np.float32
    assert refined.flags.c_contiguous
    np.testing.assert_allclose(refined.sum(0), 1, atol=1e-5)


@pytest.mark.parametrize("where", ["probability", "guide value"])
def test_a_nan_at_a_valid_pixel_is_refused(where):
    """One NaN spreads through the lattice to every pixel of the tile."""
    prob_KS, image_CS = scene((12, 12))
    image_CS = image_CS.astype(np.float32)
    (prob_KS if where == "probability" else image_CS)[0, 3, 3] = np.nan
    with pytest.raises(CrfError, match=where):
        run(prob_KS, image_CS)


def test_an_absent_engine_is_named_with_its_extra(monkeypatch):
    """The user would see ModuleNotFoundError from a worker, hours into a run."""
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(CrfError, match=r"terravox\[crf\]"):
        pick_engine("pydensecrf", device="cpu")


def test_the_key_range_is_refused_before_pydensecrf_wraps():
    """Two fields 65,536 px apart would refine each other, without a word.

    At deviation 1 the first key is sqrt(3) x + y: it leaves int16 near x = 18,900 or y = 32,750,
    and a pixel at y = 65,536 has the keys of the scene's first one.
    """
    params = resolved(appearance=MAPPING["appearance"], smoothness={"weight": 3, "position": 1})
    params.check_extent((1, 18_900))
    params.check_extent((32_750, 1))
    params.check_extent((11_980, 11_980))
    for shape, limit in [((1, 18_930), "189.."), ((32_770, 1), "327.."), ((90_000,) * 2, "119..")]:
        with pytest.raises(CrfError, match=f"reaches {limit} px a side"):
            params.check_extent(shape)

    def influence(y: int) -> float:
        features = np.zeros((2, 4), np.float32)
        features[1, 1:] = y
        probs = np.array([[0.5, 0.99, 0.99, 0.99], [0.5, 0.01, 0.01, 0.01]], np.float32)
        field = densecrf.DenseCRF(4, 2)
        field.setUnaryEnergy(-np.log(probs))
        field.addPairwiseEnergy(features, compat=3)
        return abs(float(np.asarray(field.inference(5))[0, 0]) - 0.5)

    assert influence(32_750) < 1e-6
    assert influence(65_536) > 0.1


@pytest.mark.parametrize("engine", ["native", "torch", "pydensecrf"])
@pytest.mark.parametrize("change", [{"position": 1e-4}, {"value": 1e-5}])
def test_what_float32_cannot_place_is_refused_by_the_plan(engine, change):
    """Native code would write beyond its arrays, torch fail tile by tile: after the network."""
    crf = resolved(engine=engine, appearance={**MAPPING["appearance"], **change})
    with pytest.raises(CrfError, match=r"deviations, 2.20 can be told apart"):
        crf.check_extent((500, 500))


def test_more_classes_than_the_native_engine_takes_are_refused_by_the_plan():
    """Every tile would fail by itself, after the network."""
    crf = resolved(engine="native")
    crf.check_classes(257)
    with pytest.raises(CrfError, match="258 classes, the native engine takes 257"):
        crf.check_classes(258)


def test_refine_checks_the_key_range_of_the_pixels_it_is_given():
    """A caller that forgot ``check_extent`` would get undefined casts."""
    prob_KS, image_CS = scene((8, 8))
    with pytest.raises(CrfError, match="key range"):
        run(prob_KS, image_CS, origin=(0, 200_000))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("iterations",), 0, "crf.iterations: a whole number"),
        (("iterations",), True, "crf.iterations: a whole number"),
        (("iterations",), None, "crf.iterations: a whole number"),
        (("halo",), -1, "crf.halo"),
        (("sharpness",), 3, "unknown sharpness"),
        (("smoothness",), 3, "crf.smoothness: a mapping"),
        (("smoothness", "position_m"), 3, "found position, position_m"),
        (("smoothness", "value"), 3, "unknown value"),
        (("smoothness", "weight"), "3", "crf.smoothness.weight"),
        (("smoothness", "position"), 0, "above 0"),
        (("smoothness", "position"), [], "crf.smoothness.position"),
        (("smoothness", "position"), [3, float("nan")], "finite"),
        (("appearance", "range"), [255, 0], "low must be below high"),
        (("appearance", "range"), 255, "two numbers"),
        (("appearance", "bands"), "red", "a list of band names"),
        (("appearance", "value"), -3, "above 0"),
    ],
)
def test_a_wrong_parameter_is_refused_in_one_line_that_names_it(path, value, message):
    """A typing error in a bundle would quietly become another CRF."""
    mapping = copy.deepcopy(MAPPING)
    part = mapping
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(CrfError, match=message) as error:
        CrfParams.from_mapping(mapping)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["weight", "position", "value", "bands", "range"])
def test_a_missing_parameter_has_no_default(key):
    """A default that changes the result would differ from what the bundle's author meant."""
    mapping = copy.deepcopy(MAPPING)
    del mapping["appearance"][key]
    with pytest.raises(CrfError, match=r"crf\.appearance"):
        CrfParams.from_mapping(mapping)


def test_a_crf_without_kernels_is_refused():
    """It would refine nothing and be reported as on."""
    with pytest.raises(CrfError, match="no kernel"):
        CrfParams.from_mapping({"iterations": 5})


def test_a_missing_guide_band_is_refused_with_both_lists():
    """The guide would be some other band of the image."""
    params = CrfParams.from_mapping(MAPPING)
    with pytest.raises(CrfError, match=r"red, green, blue asked, the image has red, nir"):
        params.resolve((10, 10), unit="m", channels=("red", "nir"))
    found = params.resolve((10, 10), unit="m", channels=("blue", "nir", "green", "red"))
    assert found.kernels[1].channels == (3, 2, 0)


def test_a_deviation_must_fit_the_axes_and_the_unit_of_the_image():
    """A 3-D deviation on a raster, or metres on an image without a size, has no meaning."""
    per_axis = CrfParams.from_mapping(
        {**MAPPING, "smoothness": {"weight": 3, "position": [1, 2, 3]}}
    )
    with pytest.raises(CrfError, match="3 position deviations"):
        per_axis.resolve((1, 1), unit="px", channels=RGB)
    metres = CrfParams.from_mapping({**MAPPING, "smoothness": {"weight": 3, "position_m": 60}})
    with pytest.raises(CrfError, match="deviation is in m but"):
        metres.resolve((1, 1), unit="px", channels=RGB)
    assert metres.resolve((30, 10), unit="m", channels=RGB).kernels[0].position_px == (2.0, 6.0)


def test_the_halo_is_twice_the_widest_deviation_unless_it_is_given():
    """Too short a halo shows as seams; the bundle's author may know better."""
    assert resolved().halo_px.before == (40, 40)
    assert resolved(halo=7).halo_px.after == (7, 7)
