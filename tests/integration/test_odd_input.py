"""Odd but honest input runs to a right mask: holes, tiny scenes, broken tiles, any geometry."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import rasterio
import torch
import yaml
from affine import Affine
from command import Command, tree
from rasterio.transform import from_origin
from scenes import fresh, texture, write_raster

from pipeline.errors import PlanError, SourceError
from pipeline.models.bundle import load_bundle
from pipeline.models.frame import Frame
from workflows.config import SegmentOptions
from workflows.segmenting import segment

IMAGE_CYX = np.stack([texture((96, 128), seed=seed) for seed in (1, 2, 3)])


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], slim: Path
) -> Command:
    return Command(monkeypatch, capsys, slim)


def labels(path: Path) -> np.ndarray:
    with rasterio.open(path) as mask:
        return mask.read(1)


def changed(bundle: Path, to: Path, **values: object) -> Path:
    """A copy of a bundle with other entries in its model.yaml."""
    shutil.copytree(bundle, to)
    document = yaml.safe_load((to / "model.yaml").read_text())
    document["input"] |= values.pop("input", {})  # type: ignore[arg-type]
    (to / "model.yaml").write_text(yaml.safe_dump(document | values))
    return to


def whole_labels(image_CS: np.ndarray, bundle_path: Path) -> np.ndarray:
    """(*S) class ids of one forward over the scene, mirrored to the stride by numpy alone."""
    bundle = load_bundle(bundle_path)
    stride = bundle.architecture.output_stride
    padded = image_CS.astype(np.float32)
    for axis, length in enumerate(image_CS.shape[1:], start=1):
        width = [(0, 0)] * image_CS.ndim
        width[axis] = (0, -length % stride)
        padded = np.pad(padded, width, mode="reflect" if length > 1 else "edge")
    (mean,), (std,) = bundle.input.scaling.mean, bundle.input.scaling.std
    image_BCS = torch.from_numpy((padded - mean) / std).unsqueeze(0)
    frame = Frame((0,) * (image_CS.ndim - 1), tuple(padded.shape[1:]))
    with torch.inference_mode():
        logits_KS = bundle.network()(image_BCS, frame)[0].numpy()
    kept = (slice(None), *(slice(0, n) for n in image_CS.shape[1:]))
    return logits_KS[kept].argmax(axis=0)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 5), (1, 700), (700, 1), (5, 64), (33, 31)])
def test_a_scene_smaller_than_a_tile_or_the_stride_is_segmented_whole(
    command: Command, slim: Path, tmp_path: Path, shape: tuple[int, int]
) -> None:
    """Padding that repeats the wrong pixels, or a mask of the padded size, shows here."""
    image_CYX = np.stack([texture(shape, seed=seed) for seed in (1, 2, 3)])
    striped = {"tiled": False, "blockxsize": shape[1], "blockysize": 1}
    source = write_raster(tmp_path / "tiny.tif", image_CYX, **striped)
    answer = command.segment(source, tmp_path / "o.tif", "--tile", 256)
    assert answer.code == 0, answer.err
    assert answer.manifest["source"]["shape"] == list(shape)
    np.testing.assert_array_equal(labels(tmp_path / "o.tif"), whole_labels(image_CYX, slim))


@pytest.mark.parametrize("shape_ijk", [(20, 22, 1), (1, 20, 22), (1, 1, 1), (3, 2, 1)])
def test_a_volume_of_one_slice_is_segmented(
    command: Command, slim3d: Path, tmp_path: Path, shape_ijk: tuple[int, int, int]
) -> None:
    """The same in three dimensions, whichever axis is thin."""
    image_ijk = texture(shape_ijk, seed=4).astype(np.int16)
    nib.save(nib.Nifti1Image(image_ijk, np.eye(4)), tmp_path / "thin.nii")
    answer = command.segment(tmp_path / "thin.nii", tmp_path / "o.nii", model=slim3d)
    assert answer.code == 0, answer.err
    found_ijk = np.asarray(nib.load(tmp_path / "o.nii").dataobj)
    np.testing.assert_array_equal(found_ijk.T, whole_labels(image_ijk.T[np.newaxis], slim3d))


def test_pixels_that_are_not_numbers_are_nodata_and_the_rest_is_not_touched_beyond_the_halo(
    command: Command, tmp_path: Path
) -> None:
    """One NaN in a convolution would spread over the whole receptive field."""
    image_CYX = IMAGE_CYX.astype(np.float32)
    image_CYX[0, 10:20, 30:40], image_CYX[2, 50, :] = np.nan, np.inf
    source = write_raster(tmp_path / "nan.tif", image_CYX, nodata=None)
    assert command.segment(source, tmp_path / "o.tif", "--tile", 64).code == 0
    bad = ~np.isfinite(image_CYX).all(axis=0)
    assert np.array_equal(labels(tmp_path / "o.tif") == 255, bad)
    assert np.unique(labels(tmp_path / "o.tif")[~bad]).size > 1


def test_a_scene_without_one_valid_pixel_is_all_nodata(command: Command, tmp_path: Path) -> None:
    """A cloudy week is a result, not a failure, and costs no computing."""
    source = write_raster(tmp_path / "empty.tif", IMAGE_CYX * 0)
    answer = command.segment(source, tmp_path / "o.tif", "--tile", 64)
    assert answer.code == 0, answer.err
    assert (labels(tmp_path / "o.tif") == 255).all()
    manifest = answer.manifest
    assert manifest["tiles"] == {"total": 4, "done": 4, "failed": 0, "skipped": 4}
    assert (manifest["status"], manifest["nodata_pixels"]) == ("done", 96 * 128)


def test_bands_are_taken_by_name_whatever_their_order_and_case(
    command: Command, tmp_path: Path
) -> None:
    """Red read as blue gives a mask that looks fine and is wrong everywhere."""
    bundle, names = tmp_path / "rgb", ("red", "green", "blue")
    fresh(bundle, bands=names)
    masks = {}
    for order in ((0, 1, 2), (2, 0, 1)):
        source = write_raster(tmp_path / f"{order[0]}.tif", IMAGE_CYX[list(order)])
        with rasterio.open(source, "r+") as file:
            file.descriptions = [names[band].title() for band in order]
        output = tmp_path / f"o{order[0]}.tif"
        assert command.segment(source, output, model=bundle).code == 0
        masks[order] = labels(output)
    np.testing.assert_array_equal(masks[0, 1, 2], masks[2, 0, 1])
    swapped = write_raster(tmp_path / "unnamed.tif", IMAGE_CYX[[2, 0, 1]])
    answer = command.segment(swapped, tmp_path / "u.tif", model=bundle)
    assert "bands taken by position: 1, 2, 3 as red, green, blue" in answer.manifest["notes"]
    assert (labels(tmp_path / "u.tif") != masks[0, 1, 2]).any()


def test_a_scene_without_a_crs_runs_and_says_so(
    command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An area in m2 of pixels whose size nobody knows would be invented."""
    source = write_raster(tmp_path / "nowhere.tif", IMAGE_CYX, crs=None)
    with caplog.at_level(logging.WARNING):
        answer = command.segment(source, tmp_path / "o.tif")
    assert answer.code == 0, answer.err
    assert "no CRS" in answer.manifest["notes"]
    assert "no CRS" in caplog.text
    assert "area_m2" not in answer.manifest["classes"][0]
    with rasterio.open(tmp_path / "o.tif") as mask:
        assert mask.crs is None


def test_a_rotated_affine_is_kept(command: Command, tmp_path: Path) -> None:
    """A mask put upright lies elsewhere on the ground."""
    affine = Affine(10, 3, 5e5, 3, -10, 5e6)
    source = write_raster(tmp_path / "rotated.tif", IMAGE_CYX, transform=affine)
    answer = command.segment(source, tmp_path / "o.tif")
    with rasterio.open(tmp_path / "o.tif") as mask:
        assert mask.transform == affine
    assert "rotated affine" in answer.manifest["notes"]
    row = answer.manifest["classes"][0]
    assert row["area_m2"] == pytest.approx(row["pixels"] * 109.0)


def test_a_pixel_size_unlike_the_bundles_is_refused_unless_accepted_by_name(
    command: Command, slim: Path, tmp_path: Path
) -> None:
    """Degrees are not metres: at 60 degrees north 0.001 degrees are 111 m by 56 m."""
    bundle = changed(slim, tmp_path / "sized", input={"pixel_size_m": 10.0})
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "o.tif"
    source = write_raster(
        tmp_path / "degrees.tif", IMAGE_CYX, crs="EPSG:4326",
        transform=from_origin(10, 60, 0.001, 0.001),
    )  # fmt: skip
    refused = command.segment(source, output, model=bundle)
    refused.refuses("111.", "x 55.", "10 x 10 m", "--any-resolution")
    assert not tree(output.parent)
    accepted = command.segment(source, output, "--any-resolution", model=bundle)
    assert accepted.code == 0, accepted.err
    assert any("10 x 10 m" in note for note in accepted.manifest["notes"])


def test_areas_in_degrees_are_those_of_where_the_pixels_lie(
    command: Command, tmp_path: Path
) -> None:
    """Half of the pixels of a country in its south are more than half of its hectares."""
    image_CYX = IMAGE_CYX.copy()
    image_CYX[:, :50] = 0  # nodata, to the middle of a tile
    rows = image_CYX.shape[1]
    side = 40 / rows
    source = write_raster(
        tmp_path / "degrees.tif", image_CYX, crs="EPSG:4326",
        transform=from_origin(10, 70, side, side),
    )  # fmt: skip
    answer = command.segment(
        source, tmp_path / "o.tif", "--tile", 32, "--crf", "off", "--any-resolution"
    )
    found = sum(row["area_m2"] for row in answer.manifest["classes"])
    latitude = np.radians(70 - side * (50 + (np.arange(1e5) + 0.5) / 1e5 * (rows - 50)))
    radii = (
        6378137**2 * (1 - 0.00669437999014) / (1 - 0.00669437999014 * np.sin(latitude) ** 2) ** 2
    )
    cell_m2 = (radii * np.cos(latitude)).mean() * np.radians(side) ** 2
    assert found == pytest.approx(cell_m2 * (rows - 50) * image_CYX.shape[2], rel=1e-6)


def test_rpcs_of_a_text_file_beside_the_image_are_carried(command: Command, tmp_path: Path) -> None:
    """Its coefficients have more digits than GDAL keeps: the mask would be refused in the end."""
    with pytest.warns(UserWarning, match="no geotransform"):
        source = write_raster(tmp_path / "s.tif", IMAGE_CYX, crs=None, transform=None)
    names = ("LINE", "SAMP", "LAT", "LONG", "HEIGHT")
    lines = [f"{name}_OFF: {1e3 / 3:.17g}\n{name}_SCALE: {1e3 / 7:.17g}" for name in names]
    for name in ("LINE_NUM", "LINE_DEN", "SAMP_NUM", "SAMP_DEN"):
        lines += [f"{name}_COEFF_{n}: {(n - 9.5) / 3e4:.17e}" for n in range(1, 21)]
    (tmp_path / "s_RPC.TXT").write_text("\n".join(lines))
    answer = command.segment(source, tmp_path / "o.tif", "--crf", "off", "--any-resolution")
    assert answer.code == 0, answer.err
    with rasterio.open(source) as image, rasterio.open(tmp_path / "o.tif") as mask:
        wanted, found = (file.rpcs.line_num_coeff for file in (image, mask))
    assert wanted == pytest.approx([(n - 9.5) / 3e4 for n in range(1, 21)])
    np.testing.assert_allclose(found, wanted, rtol=1e-14)


def test_a_scan_of_several_volumes_needs_one_chosen(
    command: Command, slim3d: Path, tmp_path: Path
) -> None:
    """The first of them by default would be a guess about a patient."""
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "o.nii.gz"
    first, second = (texture((20, 22, 24), seed=seed).astype(np.int16) for seed in (1, 2))
    source, single = tmp_path / "4d.nii.gz", tmp_path / "3d.nii.gz"
    nib.save(nib.Nifti1Image(np.stack([first, second], axis=-1), np.eye(4)), source)
    nib.save(nib.Nifti1Image(second, np.eye(4)), single)
    command.segment(source, output, model=slim3d).refuses("2 volumes", "--volume N", "0 to 1")
    command.segment(source, output, "--volume", 2, model=slim3d).refuses("--volume 2", "2 volumes")
    assert not tree(output.parent)
    answer = command.segment(source, output, "--volume", 1, model=slim3d)
    assert answer.manifest["source"]["selection"] == "volume 1 of 2"
    assert command.segment(single, tmp_path / "s.nii.gz", model=slim3d).code == 0
    found, wanted = (nib.load(p).dataobj for p in (output, tmp_path / "s.nii.gz"))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_class_ids_above_254_make_a_mask_of_uint16(
    command: Command, slim: Path, tmp_path: Path
) -> None:
    """300 in a byte is 44, a class that may exist."""
    names = ["a", "b", "c", "d"]
    classes = [
        {"id": number, "name": name, "color": "#102030"}
        for number, name in zip((0, 255, 300, 65534), names, strict=True)
    ]
    bundle = changed(slim, tmp_path / "wide", classes=classes, ignore_index=65535)
    image_CYX = IMAGE_CYX.copy()
    image_CYX[:, :9, :9] = 0
    source = write_raster(tmp_path / "hole.tif", image_CYX)
    plain, wide = tmp_path / "plain.tif", tmp_path / "wide.tif"
    assert command.segment(source, plain).code == 0
    answer = command.segment(source, wide, model=bundle)
    assert answer.code == 0, answer.err
    with rasterio.open(wide) as mask:
        assert (mask.dtypes, mask.nodata) == (("uint16",), 65535)
    lookup = np.full(256, 65535, np.uint16)
    lookup[:4] = (0, 255, 300, 65534)
    np.testing.assert_array_equal(labels(wide), lookup[labels(plain)])
    assert [row["id"] for row in answer.manifest["classes"]] == [0, 255, 300, 65534]


def test_a_file_cut_short_loses_only_the_tiles_that_need_what_is_gone(
    command: Command, tmp_path: Path
) -> None:
    """Exit 3 and no output; by name an output with holes; and a repaired file is another source."""
    image_CYX = np.stack([texture((256, 32), seed=seed) for seed in (1, 2, 3)])
    source, output, whole = (tmp_path / name for name in ("cut.tif", "o.tif", "whole.tif"))
    write_raster(source, image_CYX, blockxsize=32, blockysize=32, interleave="pixel")
    assert command.segment(source, whole, "--tile", 32).code == 0
    intact = source.read_bytes()
    source.write_bytes(intact[:-100])
    first = command.segment(source, output, "--tile", 32)
    assert (first.code, first.manifest["status"]) == (3, "partial")
    # The last 32 rows are gone, and a core needs 60 below it.
    assert [row["tile"] for row in first.manifest["failed_tiles"]] == [5, 6, 7]
    assert "Traceback" not in first.err
    assert "tile 7 failed" in first.err
    assert "is the file complete?" in first.err
    assert not output.exists()
    allowed = command.segment(source, output, "--tile", 32, "--allow-failed", 3)
    assert (allowed.code, allowed.manifest["status"]) == (0, "partial")
    assert allowed.manifest["output"] == str(output)
    np.testing.assert_array_equal(labels(output)[:160], labels(whole)[:160])
    assert (labels(output)[160:] == 255).all()
    assert allowed.manifest["nodata_pixels"] == 96 * 32
    before = output.read_bytes()
    again = command.segment(source, output, "--tile", 32)
    assert (again.code, again.manifest["output"]) == (3, None)
    source.write_bytes(intact)
    command.segment(source, output, "--tile", 32).refuses("source", "differ", "--fresh")
    assert output.read_bytes() == before


def test_a_source_that_changes_while_it_is_read_makes_no_mask(slim: Path, tmp_path: Path) -> None:
    """Half of one day's image and half of the next would stand under the digest of the first."""
    source, output = write_raster(tmp_path / "a.tif", IMAGE_CYX), tmp_path / "o.tif"
    asked = SegmentOptions(tile=32, backend="serial", tracking_uri="none")

    def stop() -> bool:
        write_raster(source, IMAGE_CYX + 1)
        return False

    with pytest.raises(SourceError, match="has changed while it was read"):
        segment(source, output, model=slim, options=asked, stop=stop)
    assert not output.exists()
    with pytest.raises(PlanError, match="holds another run"):
        segment(source, output, model=slim, options=asked)
    again = segment(source, output, model=slim, options=asked.model_copy(update={"fresh": True}))
    assert again["status"] == "done"
