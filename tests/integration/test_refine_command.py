"""``terravox refine``: anybody's scores, refined tile by tile on the image's own grid."""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import rasterio
import yaml
from command import Command
from rasterio.transform import from_origin
from real_files import assert_same_grid, labels_of
from scenes import texture, write_raster

from pipeline.crf.dense import refine as refine_array
from pipeline.crf.engine import engine_named
from pipeline.crf.params import CrfParams
from pipeline.errors import SourceError
from pipeline.ports import Block
from workflows.config import RefineOptions
from workflows.refining import refine

pytest.importorskip("pydensecrf.densecrf", reason="the extra 'crf' is not installed")

SHAPE = (150, 190)
BANDS = ("red", "green", "blue")
CRF = {
    "engine": "pydensecrf",
    "iterations": 4,
    "smoothness": {"weight": 3, "position_m": 30},
    "appearance": {
        "weight": 4, "position": 9, "value": 13, "bands": list(BANDS), "range": [0, 2000],
    },
}  # fmt: skip
NAMES = ("water", "crop", "forest")
SERIAL = RefineOptions(backend="serial", tracking_uri="none")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with a nodata corner, noisy scores that follow its brightness, and a CRF."""
    folder = tmp_path_factory.mktemp("refine")
    image_CYX = np.stack([texture(SHAPE, seed=seed) for seed in (1, 2, 3)])
    image_CYX[:, :20, :30] = 0
    write_raster(folder / "image.tif", image_CYX)
    describe(folder / "image.tif", BANDS)
    write_raster(folder / "scores.tif", noisy(image_CYX[0]), nodata=None)
    describe(folder / "scores.tif", NAMES)
    (folder / "crf.yaml").write_text(yaml.safe_dump({"crf": CRF}))
    return folder


def noisy(image_S: np.ndarray) -> np.ndarray:
    """(3, *S) float32 probabilities by brightness, wrong in a third of the pixels."""
    truth_S = np.digitize(image_S, np.quantile(image_S, [0.33, 0.67]))
    noise_KS = np.random.default_rng(3).normal(0, 1.5, (3, *image_S.shape))
    odds_KS = np.exp(noise_KS + 1.5 * (truth_S == np.arange(3).reshape(3, *(1,) * truth_S.ndim)))
    return (odds_KS / odds_KS.sum(0)).astype(np.float32)


def describe(path: Path, names: tuple[str, ...]) -> None:
    with rasterio.open(path, "r+") as file:
        file.descriptions = names


@pytest.fixture
def terravox(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys, Path())


def run(command: Command, folder: Path, output: Path, *more: object, scores: Path | None = None):
    return command(
        "refine", folder / "image.tif", "--scores", scores or folder / "scores.tif",
        "-o", output, "--crf", folder / "crf.yaml", "--backend", "serial",
        "--tracking-uri", "none", "--json", *more,
    )  # fmt: skip


def whole(folder: Path) -> np.ndarray:
    """Labels of the CRF over the whole image at once, 255 where the image has no data."""
    with rasterio.open(folder / "image.tif") as file:
        image_CYX = file.read()
    with rasterio.open(folder / "scores.tif") as file:
        prob_KYX = file.read()
    valid_YX = image_CYX.all(axis=0)
    refined_KYX = refine_array(
        prob_KYX,
        block=Block(image_CYX, valid_YX),
        origin=(0, 0),
        params=CrfParams.from_mapping(CRF).resolve((10, 10), unit="m", channels=BANDS),
        engine=engine_named("pydensecrf", device="cpu", threads=1),
    )
    return np.where(valid_YX, refined_KYX.argmax(0), 255)


def test_one_tile_is_the_crf_of_the_whole_image_on_its_own_grid(made, terravox, tmp_path):
    """Scores read in another order, a unit mistaken or nodata refined would show here."""
    answer = run(terravox, made, tmp_path / "mask.tif")
    assert answer.code == 0, answer.err
    assert_same_grid(tmp_path / "mask.tif", made / "image.tif")
    np.testing.assert_array_equal(labels_of(tmp_path / "mask.tif"), whole(made))
    manifest = answer.manifest
    assert [row["name"] for row in manifest["classes"]] == list(NAMES)
    assert manifest["nodata_pixels"] == 600
    assert manifest["crf"]["engine"] == "pydensecrf"
    with rasterio.open(made / "scores.tif") as file:
        changed = file.read().argmax(0) != labels_of(tmp_path / "mask.tif")
    assert 0.05 < changed.mean() < 0.9


def test_tiles_agree_with_the_whole_but_for_a_stated_share(made, terravox, tmp_path):
    """A tile without a halo, or in its own coordinates, would leave seams that nobody states."""
    answer = run(terravox, made, tmp_path / "mask.tif", "--tile", 64)
    assert answer.code == 0, answer.err
    apart = (labels_of(tmp_path / "mask.tif") != whole(made)).mean()
    assert apart < 0.01
    seam = answer.manifest["seam"]
    assert seam["pixels"] > 1000
    assert seam["label_disagreement"] <= seam["label_disagreement_upper_95"] < 0.05
    assert answer.manifest["tiles"] == {"total": 9, "done": 9, "failed": 0, "skipped": 0}


def test_a_run_that_was_stopped_goes_on_and_a_finished_one_does_nothing(made, tmp_path):
    """A night's work would start over, or leave another mask than an uninterrupted run."""
    asked = SERIAL.model_copy(update={"tile": 64})
    arguments = {"scores": made / "scores.tif", "crf": made / "crf.yaml", "options": asked}
    once = refine(made / "image.tif", tmp_path / "once.tif", **arguments)
    asks = count()
    part = refine(
        made / "image.tif", tmp_path / "mask.tif", **arguments, stop=lambda: next(asks) > 3
    )
    assert part["status"] == "interrupted"
    assert not (tmp_path / "mask.tif").exists()
    rest = refine(made / "image.tif", tmp_path / "mask.tif", **arguments)
    assert rest["status"] == "done"
    assert 0 < part["tiles"]["done"] < 9
    assert rest["output_sha256"] == once["output_sha256"]
    before = (tmp_path / "mask.tif").stat().st_mtime_ns
    again = refine(made / "image.tif", tmp_path / "mask.tif", **arguments)
    assert again["seconds"] == rest["seconds"]
    assert (tmp_path / "mask.tif").stat().st_mtime_ns == before


def test_actors_give_the_bytes_of_this_process(cluster, made, tmp_path):
    """A recipe that does not survive its pickle, or reads another file there, would fail."""
    serial = SERIAL.model_copy(update={"tile": 64})
    pool = serial.model_copy(update={"backend": "ray", "workers": 2})
    digests = {
        refine(
            made / "image.tif", tmp_path / f"{asked.backend}.tif", scores=made / "scores.tif",
            crf=made / "crf.yaml", options=asked,
        )["output_sha256"]
        for asked in (serial, pool)
    }  # fmt: skip
    assert len(digests) == 1


def test_bytes_of_probability_are_255ths(made, terravox, tmp_path):
    """A division by 256, or none, would be another unary for every pixel."""
    with rasterio.open(made / "scores.tif") as file:
        prob_KYX = file.read()
    prob_KYX[:, 50:60, 50:70] = 0
    bytes_KYX = np.rint(prob_KYX * 255).astype(np.uint8)
    scores = write_raster(tmp_path / "bytes.tif", bytes_KYX, nodata=None)
    answer = run(terravox, made, tmp_path / "mask.tif", scores=scores)
    assert answer.code == 0, answer.err
    labels_YX, wanted_YX = labels_of(tmp_path / "mask.tif"), whole(made)
    assert (labels_YX[50:60, 50:70] == 255).all()
    assert answer.manifest["nodata_pixels"] == 800
    known_YX = labels_YX != 255
    known_YX[40:70, 40:80] = False
    assert (labels_YX == wanted_YX)[known_YX].mean() > 0.99


def test_classes_of_a_file_give_ids_names_and_colours(made, terravox, tmp_path):
    """A mask with ids 0, 1, 2 where the map's legend says 11, 300, 7 cannot be joined to it."""
    rows = [
        {"id": n, "name": name, "color": "#102030"}
        for n, name in zip((11, 300, 7), "abc", strict=True)
    ]
    legend = tmp_path / "classes.yaml"
    legend.write_text(yaml.safe_dump({"classes": rows}))
    answer = run(terravox, made, tmp_path / "mask.tif", "--classes", legend)
    assert answer.code == 0, answer.err
    with rasterio.open(tmp_path / "mask.tif") as file:
        assert (file.dtypes, file.nodata) == (("uint16",), 65535)
        assert set(np.unique(file.read(1))) == {7, 11, 300, 65535}
    legend.write_text(yaml.safe_dump(rows[:2]))
    run(terravox, made, tmp_path / "other.tif", "--classes", legend).refuses("a list of 3 classes")


def test_a_volume_is_guided_by_all_contrasts_of_its_file(tmp_path, terravox):
    """A 4-D scan would be guided by its first contrast alone, or scores read as one volume."""
    shape = (22, 26, 14)
    contrasts = np.stack([texture(shape, seed=s) for s in (5, 6)], -1).astype(np.int16)
    affine = np.diag([-1.0, 1, 3, 1])
    nib.save(nib.Nifti1Image(contrasts, affine), tmp_path / "scan.nii.gz")
    prob_KS = noisy(contrasts[..., 1])
    nib.save(nib.Nifti1Image(np.moveaxis(prob_KS, 0, -1), affine), tmp_path / "scores.nii.gz")
    crf = {
        "engine": "pydensecrf",
        "iterations": 3,
        "kernels": [
            {"weight": 3, "position_mm": 3},
            {"weight": 4, "position_mm": [9, 6, 6], "value": [30, 9], "bands": ["1", "2"],
             "range": [0, 2000]},
        ],
    }  # fmt: skip
    (tmp_path / "crf.yaml").write_text(yaml.safe_dump(crf))
    answer = terravox(
        "refine", tmp_path / "scan.nii.gz", "--scores", tmp_path / "scores.nii.gz", "-o",
        tmp_path / "mask.nii.gz", "--crf", tmp_path / "crf.yaml", "--backend", "serial",
        "--tracking-uri", "none", "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    params = CrfParams.from_mapping(crf).resolve((3, 1, 1), unit="mm", channels=("1", "2"))
    canonical = (slice(None), slice(None, None, -1))  # the file's i runs from right to left
    guide_CZYX = np.moveaxis(contrasts, -1, 0)[canonical].transpose(0, 3, 2, 1)
    refined_KZYX = refine_array(
        prob_KS[canonical].transpose(0, 3, 2, 1),
        block=Block(guide_CZYX, np.ones(shape[::-1], bool)),
        origin=(0, 0, 0),
        params=params,
        engine=engine_named("pydensecrf", device="cpu", threads=1),
    )
    mask = nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(mask.affine, affine)
    found_ZYX = np.asarray(mask.dataobj)[::-1].transpose(2, 1, 0)
    np.testing.assert_array_equal(found_ZYX, refined_KZYX.argmax(0))
    assert (found_ZYX != prob_KS[canonical].transpose(0, 3, 2, 1).argmax(0)).mean() > 0.05


def test_scores_stored_in_another_order_are_taken_where_they_lie(tmp_path, terravox):
    """A scan from its scanner, and a network's scores in its own order, would be refused."""
    scan = texture((22, 26, 14), seed=5).astype(np.int16)
    image = nib.Nifti1Image(scan, np.diag([-1.0, 1, 3, 1]))
    nib.save(image, tmp_path / "scan.nii.gz")
    prob_IJKC = np.moveaxis(noisy(scan), 0, -1)
    scores = nib.Nifti1Image(prob_IJKC, image.affine)
    turned = scores.as_reoriented(np.array([[2, 1], [0, -1], [1, -1]]))
    assert turned.shape != scores.shape
    shifted = nib.Nifti1Image(turned.get_fdata(), turned.affine + np.diag([0.1, 0, 0, 0]))
    (tmp_path / "crf.yaml").write_text("{iterations: 1, smoothness: {weight: 1, position: 1}}")
    answers = []
    line = ("--crf", tmp_path / "crf.yaml", "--backend", "serial", "--tracking-uri", "none")
    for name, file in (("same", scores), ("turned", turned), ("shifted", shifted)):
        given, mask = tmp_path / f"{name}.nii.gz", tmp_path / f"{name}-mask.nii.gz"
        nib.save(file, given)
        scan_file = tmp_path / "scan.nii.gz"
        answers.append(terravox("refine", scan_file, "--scores", given, "-o", mask, *line))
    assert [answer.code for answer in answers] == [0, 0, 2], answers[1].err
    masks = [nib.load(tmp_path / f"{name}-mask.nii.gz") for name in ("same", "turned")]
    np.testing.assert_array_equal(masks[0].dataobj, masks[1].dataobj)
    np.testing.assert_array_equal(masks[1].affine, image.affine)


def four_bytes(prob_KYX: np.ndarray) -> np.ndarray:
    return np.rint(prob_KYX[[0, 1, 2, 2]] * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("change", "profile", "words"),
    [
        (lambda p: (p * 100).astype(np.int16), {}, "int16"),
        (lambda p: p[:1], {}, "a band for each class"),
        (lambda p: p, {"nodata": 0}, "which is a probability as well"),
        (lambda p: p, {"transform": from_origin(500005, 5000000, 10, 10)}, "0.5 px apart"),
        (lambda p: p[:, 1:], {}, "differ in shape"),
        (lambda p: p, {"crs": "EPSG:32634"}, "differ in CRS"),
        (four_bytes, {"photometric": "RGB", "alpha": "YES"}, "describe its bands"),
    ],
)
def test_scores_that_cannot_be_meant_are_refused(made, terravox, tmp_path, change, profile, words):
    """Scores of another place, or a class taken for transparency, give a mask that looks fine."""
    with rasterio.open(made / "scores.tif") as file:
        prob_KYX = file.read()
    scores = write_raster(tmp_path / "scores.tif", change(prob_KYX), **{"nodata": None, **profile})
    run(terravox, made, tmp_path / "mask.tif", scores=scores).refuses(words)
    assert not (tmp_path / "mask.tif.run").exists()


def test_logits_are_refused_before_there_is_a_mask(made, terravox, tmp_path):
    """Their file looks like that of probabilities; clipped to those, nearly all classes tie."""
    with rasterio.open(made / "scores.tif") as file:
        logits_KYX = np.log(file.read())
    scores = write_raster(tmp_path / "scores.tif", logits_KYX, nodata=None)
    answer = run(terravox, made, tmp_path / "mask.tif", scores=scores)
    assert answer.code == 3
    assert "the scores are no probabilities" in answer.err
    assert not (tmp_path / "mask.tif").exists()


@pytest.mark.parametrize("name", ["image.tif", "scores.tif"])
def test_a_file_that_changes_while_it_is_read_gives_no_mask(made, tmp_path, name):
    """Half of the mask would be of yesterday's scores."""
    for file in ("image.tif", "scores.tif"):
        shutil.copy(made / file, tmp_path / file)
    with rasterio.open(tmp_path / name) as file:
        profile, image_CYX = file.profile, file.read()

    def changed() -> bool:
        with rasterio.open(tmp_path / name, "w", **profile) as file:
            file.write(image_CYX[:, ::-1])
        return False

    output = tmp_path / "mask.tif"
    with pytest.raises(SourceError, match=f"{name} has changed while it was read"):
        refine(
            tmp_path / "image.tif", output, scores=tmp_path / "scores.tif",
            crf=made / "crf.yaml", options=SERIAL, stop=changed,
        )  # fmt: skip
    assert not output.exists()
