"""The generated landscape, the files it is written to, the brain volume and the baseline."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import rasterio

from pipeline.domain import Region
from pipeline.errors import SourceError
from pipeline.metrics import Confusion
from pipeline.models.bundle import load_bundle
from workflows.demo import landscape, scene, volume
from workflows.demo.baseline import GaussianClassifier
from workflows.demo.landscape import render
from workflows.demo.noise import cells, fractal, normal, strips, uniform
from workflows.demo.train_bundles import BUNDLES

HERE = Region((1000, 2000), (1200, 2260))


def grid(region: Region) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = (
        np.arange(a, b, dtype=np.float32) for a, b in zip(region.start, region.stop, strict=True)
    )
    return rows[:, None], columns[None, :]


def test_a_block_computed_alone_is_the_same_part_of_the_landscape() -> None:
    """Blocks would show as squares in the scene, and the scene would depend on its size."""
    image, label = render(HERE, seed=5)
    for part in HERE.blocks((93, 128)):
        image_part, label_part = render(part, seed=5)
        box = part.slices(within=HERE)
        assert np.array_equal(image[:, box[0], box[1]], image_part)
        assert np.array_equal(label[box], label_part)


def test_another_seed_is_another_landscape() -> None:
    """The demo would be scored on what was trained on."""
    image, label = render(HERE, seed=5)
    other_image, other_label = render(HERE, seed=6)
    assert (image == other_image).mean() < 0.1
    assert (label == other_label).mean() < 0.9
    assert len({scene.TRAINING_SEED, scene.VALIDATION_SEED, scene.DEMO_SEED}) == 3


def test_far_from_the_origin_the_landscape_is_as_fine() -> None:
    """Coordinates in float32 would turn fields into steps in a scene of 200,000 px."""
    near, _ = render(Region((0, 0), (256, 256)), seed=5)
    far, _ = render(Region((199_000, 199_000), (199_256, 199_256)), seed=5)
    repeated = [(band[:, 1:] == band[:, :-1]).mean() for band in (near[3], far[3])]
    assert repeated[1] < repeated[0] + 0.02


def test_every_class_and_cloud_occur_and_disease_lies_within_crops() -> None:
    """The demo's table would have empty rows; a disease outside of fields would be no disease."""
    parts = landscape.scattered(24, side=256, seed=scene.DEMO_SEED)
    labels = np.stack([label for _, label in parts])
    counts = np.bincount(labels.ravel(), minlength=256)
    assert (counts[[0, 1, 2, 3, 4, 5, landscape.IGNORED]] > 0.002 * labels.size).all()
    assert counts.sum() == counts[:6].sum() + counts[landscape.IGNORED]
    for image, label in parts:
        assert np.array_equal((image == landscape.NODATA).any(axis=0), label == landscape.IGNORED)
    nir_red = np.concatenate([image[[3, 2]].reshape(2, -1) for image, _ in parts], axis=1)
    sick, crop = (nir_red[:, labels.ravel() == k] for k in (landscape.DISEASE, landscape.CROP))
    assert np.median(sick[0]) < np.median(crop[0])
    assert np.median(sick[1]) > np.median(crop[1])


def test_the_files_say_what_was_rendered_and_where_it_is(tmp_path: Path) -> None:
    """The demo segments files: bands, nodata, grid and truth must be readable from them alone."""
    seen: list[tuple[int, int]] = []
    path, truth = tmp_path / "scene.tif", tmp_path / "truth.tif"
    scene.write_scene(path, truth, size=600, seed=3, progress=lambda *done: seen.append(done))
    image_CS, label_S = render(Region.whole((600, 600)), seed=3)
    with rasterio.open(path) as image, rasterio.open(truth) as labels:
        assert np.array_equal(image.read(), image_CS)
        assert np.array_equal(labels.read(1), label_S)
        assert image.descriptions == landscape.BANDS
        assert (image.nodata, labels.nodata) == (0, 255)
        assert image.crs.is_projected
        assert image.res == (10.0, 10.0)
        assert image.transform == labels.transform
        assert image.block_shapes[0] == (512, 512)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_scene_without_pixels_is_refused(tmp_path: Path) -> None:
    """GDAL's own message would not say which option was wrong."""
    with pytest.raises(SourceError, match="at least 1 px"):
        scene.write_scene(tmp_path / "a.tif", tmp_path / "b.tif", size=0, seed=1)


def test_noise_has_the_moments_it_states() -> None:
    """Thresholds in the landscape are in deviations: classes would vanish or flood the scene."""
    y, x = grid(Region((0, 0), (600, 600)))
    noise = fractal(y, x, scale=7, octaves=3, seed=1)
    assert abs(noise.mean()) < 0.1
    assert noise.std() == pytest.approx(1, abs=0.06)
    keys = np.arange(100_000, dtype=np.uint32)
    assert uniform(keys, 1).mean() == pytest.approx(0.5, abs=0.01)
    assert normal(keys, 1).std() == pytest.approx(1, abs=0.02)
    assert abs(np.corrcoef(uniform(keys, 1), uniform(keys, 2))[0, 1]) < 0.02


def test_cells_belong_to_their_nearest_point() -> None:
    """Farms would be cut by straight lines of the lattice that places their points."""
    y, x = grid(Region((-50, 30), (150, 230)))
    found = cells(y, x, scale=40, seed=2)
    points = np.unique(
        np.stack([(y - found.dy_S).round(2), (x - found.dx_S).round(2)], axis=-1).reshape(-1, 2),
        axis=0,
    )
    distance = np.hypot(y[..., None] - points[:, 0], x[..., None] - points[:, 1])
    assert np.allclose(distance.min(axis=-1), np.hypot(found.dy_S, found.dx_S), atol=0.02)


def test_strips_cover_the_line_once_and_end_where_they_say() -> None:
    """Fields would overlap, or leave slivers between them."""
    t = np.linspace(-20, 20, 40_001, dtype=np.float32)
    piece, end = strips(t, name_S=np.zeros(t.shape, np.uint32), seed=4)
    changes = np.flatnonzero(np.diff(piece))
    assert len(changes) == len(np.unique(piece)) - 1
    assert (end >= -1e-4).all()
    assert end[changes].max() < 2e-3


def test_the_brain_is_labelled_by_its_maps_and_split_where_it_is_not_symmetric() -> None:
    """Left and right are mirror images: a held-back hemisphere would have been trained on."""
    if importlib.util.find_spec("nilearn") is None:
        pytest.skip("nilearn (the extra 'demo') is not installed")
    brain = volume.load_template()
    assert brain.t1_S.shape == (189, 233, 197)
    assert np.array_equal(brain.t1_S, brain.t1_S[:, :, ::-1])
    assert np.array_equal(brain.label_S == 0, brain.t1_S == 0)
    white, grey = (np.median(brain.t1_S[brain.label_S == k]) for k in (3, 2))
    assert white > grey
    overlap = brain.trained & brain.scored
    assert overlap.size == 0
    assert brain.trained | brain.scored == Region.whole(brain.t1_S.shape)
    inside = [(brain.part(half)[1] > 0).sum() for half in (brain.trained, brain.scored)]
    assert min(inside) > 0.4 * sum(inside)


def test_without_nilearn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ImportError of somebody else's package tells nobody what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SourceError, match="extra 'demo'"):
        volume.load_template()


def test_the_per_pixel_classifier_equals_the_gaussian_formula() -> None:
    """A crippled baseline would flatter the network."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (60, 50)).astype(np.uint8)
    image = rng.normal(0, 20, (2, 60, 50)) + 30 * np.stack([label, label == 1])
    classifier = GaussianClassifier.fit([(image, label)], classes=3)
    scores = []
    for k in range(3):
        pixels = image[:, label == k]
        mean, covariance = pixels.mean(axis=1), np.cov(pixels) + np.eye(2)
        centred = image - mean[:, None, None]
        form = np.einsum("cyx,cd,dyx->yx", centred, np.linalg.inv(covariance), centred)
        share = np.log(pixels.shape[1]) - np.linalg.slogdet(covariance)[1] / 2
        scores.append(share - form / 2)
    expected = np.argmax(scores, axis=0)
    assert (classifier.predict(image) == expected).mean() > 0.999


@pytest.mark.parametrize("name", ["fields", "brain"])
def test_the_shipped_bundles_fit_their_data(name: str) -> None:
    """The demo would fail, or score a model that was trained on other classes."""
    bundle = load_bundle(BUNDLES / name)
    names = landscape.CLASSES if name == "fields" else volume.CLASSES
    assert tuple(info.name for info in bundle.classes) == names
    assert sum(p.numel() for p in bundle.network().parameters()) <= 1_000_000


def test_the_shipped_fields_bundle_beats_the_per_pixel_classifier() -> None:
    """Weights saved untrained, or fed with input scaled otherwise, would pass for a demo."""
    from workflows.demo.baseline import fit_to_scene
    from workflows.demo.train_bundles import normalised, probabilities

    bundle = load_bundle(BUNDLES / "fields")
    network, baseline = bundle.network(), fit_to_scene()
    ours, theirs = (Confusion(bundle.class_values) for _ in range(2))
    for image_CS, label_S in landscape.scattered(4, side=256, seed=scene.DEMO_SEED):
        guess_KS = probabilities(network, normalised(image_CS, bundle))
        valid = label_S != landscape.IGNORED
        for confusion, mask in (
            (ours, guess_KS.argmax(axis=0).astype(np.uint8)),
            (theirs, baseline.predict(image_CS)),
        ):
            confusion.add(np.where(valid, mask, 255).astype(np.uint8), label_S, ignore=255)
    assert ours.scores().mean_iou > theirs.scores().mean_iou + 0.08
