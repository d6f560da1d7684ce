"""``--aoi``: labels inside alone, the same bytes there, and nothing else read or computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyogrio.raw
import pytest
import rasterio
import shapely
import yaml
import zarr
from command import Command
from polygons import inside, placed, write_vector
from rasterio.features import geometry_mask
from rasterio.warp import transform_geom
from scenes import fresh, texture, write_raster

from adapters.nifti import NiftiSource
from adapters.uri import open_source
from pipeline.domain import Region
from pipeline.models.architecture import Architecture
from pipeline.models.fresh import new_bundle
from workflows.aoi import open_aoi
from workflows.batching import batch
from workflows.config import SegmentOptions
from workflows.run_dir import file_digest
from workflows.segmenting import plan, segment

FIELDS = (
    shapely.Polygon([(90, 130), (300, 150), (210, 330), (120, 250)]),
    shapely.Point(480, 60).buffer(40),
)
"""In pixels of the scene: both lie astride tiles, of 128 px and of 256."""

SHAPE = (440, 560)
HOLE = (slice(200, 220), slice(150, 190))


def options(**changes: object) -> SegmentOptions:
    asked = {
        "backend": "serial", "tracking_uri": "none", "precision": "fp32", "crf": "off", "tile": 128,
    }  # fmt: skip
    return SegmentOptions.model_validate(asked | changes)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three bands, with a nodata hole in the first field."""
    image_CYX = np.stack([texture(SHAPE, seed=seed) for seed in (1, 2, 3)])
    image_CYX[(1, *HOLE)] = 0
    return write_raster(tmp_path_factory.mktemp("scene") / "scene.tif", image_CYX)


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fields in degrees."""
    path = tmp_path_factory.mktemp("fields") / "fields.gpkg"
    return write_vector(path, *(placed(f, crs="EPSG:4326") for f in FIELDS), crs="EPSG:4326")


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], slim: Path
) -> Command:
    return Command(monkeypatch, capsys, slim)


def labels_of(output: Path) -> np.ndarray:
    """(*S) of the mask."""
    source = open_source(str(output))
    return source.read(Region.whole(source.info.shape)).image_CS[0]


@pytest.mark.parametrize(
    "asked",
    [{"scores": "uint8"}, {"crf": "crf.yaml"}],
    ids=["network", "crf"],
)
def test_inside_the_bytes_are_those_of_the_whole_scene(
    asked: dict[str, object], scene: Path, slim: Path, fields: Path, tmp_path: Path
) -> None:
    """A field's map would depend on what else was asked for."""
    if "crf" in asked:
        kernels = {
            "iterations": 3,
            "smoothness": {"weight": 3, "position": 3},
            "appearance": {
                "weight": 4, "position": 20, "value": 60, "bands": [1, 2, 3], "range": [0, 2000]
            },
        }  # fmt: skip
        (tmp_path / "crf.yaml").write_text(yaml.safe_dump(kernels))
        asked = {"crf": str(tmp_path / "crf.yaml")}
    whole, part = tmp_path / "whole.tif", tmp_path / "part.tif"
    asked = {"tile": 256, **asked}
    segment(scene, whole, model=slim, options=options(**asked))
    manifest = segment(scene, part, model=slim, options=options(**asked, aoi=fields))
    wanted, all_YX = inside(SHAPE, *FIELDS), labels_of(whole)
    assert (all_YX[wanted] == 255).sum() == 20 * 40
    assert np.array_equal(labels_of(part), np.where(wanted, all_YX, 255))
    if "scores" in asked:
        stores = (zarr.open_array(f"{path}.run/scores.zarr", mode="r")[:] for path in (whole, part))
        all_KYX, part_KYX = stores
        assert np.array_equal(part_KYX, np.where(wanted, all_KYX, 0))
    with rasterio.open(whole) as one, rasterio.open(part) as other:
        assert (one.crs, one.transform, one.shape) == (other.crs, other.transform, other.shape)
        assert other.tags()["TERRAVOX_AOI_DIGEST"] == manifest["aoi"]["digest"]
    assert manifest["tiles"]["skipped"] > 0


def test_canonical_windows_give_the_same_fields_for_any_tile(
    scene: Path, slim: Path, fields: Path, tmp_path: Path
) -> None:
    """Two maps of a field from two machines could not be compared."""
    asked = {"windows": "canonical"}
    segment(scene, tmp_path / "all.tif", model=slim, options=options(tile=256, **asked))
    wanted = np.where(inside(SHAPE, *FIELDS), labels_of(tmp_path / "all.tif"), 255)
    for tile in (256, 512):
        output = tmp_path / f"{tile}.tif"
        segment(scene, output, model=slim, options=options(tile=tile, aoi=fields, **asked))
        assert np.array_equal(labels_of(output), wanted)


def test_the_manifest_counts_what_the_mask_holds(
    scene: Path, slim: Path, fields: Path, tmp_path: Path
) -> None:
    """Areas of crops would be those of tiles, and what nobody asked for a failure."""
    output = tmp_path / "o.tif"
    manifest = segment(scene, output, model=slim, options=options(aoi=fields))
    labels = labels_of(output)
    for row in manifest["classes"]:
        assert row["pixels"] == (labels == row["id"]).sum()
        assert row["area_m2"] == row["pixels"] * 100
    assert manifest["nodata_pixels"] == (labels == 255).sum()
    cores = inside(SHAPE, *FIELDS)
    cores = np.pad(cores, ((0, 72), (0, 80))).reshape(4, 128, 5, 128)
    running = int(cores.any(axis=(1, 3)).sum())
    assert manifest["tiles"] == {"total": 20, "done": 20, "failed": 0, "skipped": 20 - running}
    planned = plan(scene, model=slim, options=options(aoi=fields))
    assert (planned["tiles"], planned["tiles_outside"]) == (running, 20 - running)
    assert planned["aoi"] == manifest["aoi"]
    whole = plan(scene, model=slim, options=options())
    share = planned["multiply_adds"] / whole["multiply_adds"]
    assert share == pytest.approx(running / 20, rel=0.25)  # inner tiles have more halo


def test_seams_are_measured_between_tiles_that_run(
    scene: Path, slim: Path, fields: Path, tmp_path: Path, command: Command
) -> None:
    """The certificate would speak of places that have no label, or of none."""
    output = tmp_path / "o.tif"
    seam = segment(scene, output, model=slim, options=options(aoi=fields))["seam"]
    assert (seam["passed"], seam["exact"]) == (True, True)
    assert seam["pixels"] > 0
    samples = json.loads(Path(f"{output}.run/certificate.json").read_text())["samples"]
    wanted = inside(SHAPE, *FIELDS)
    wanted[HOLE] = False
    for row in samples:
        window = tuple(slice(a, b) for a, b in zip(row["start"], row["stop"], strict=True))
        assert row["pixels"] == wanted[window].sum() > 0
    again = command("certify", f"{output}.run", "--json")
    assert (again.code, again.manifest["passed"]) == (0, True)
    write_vector(tmp_path / "fields.gpkg", placed(FIELDS[0]))
    moved = json.loads(Path(f"{output}.run/plan.json").read_text())
    moved["asked"]["aoi"] = str(tmp_path / "fields.gpkg")
    Path(f"{output}.run/plan.json").write_text(json.dumps(moved))
    command("certify", f"{output}.run").refuses("fields.gpkg", "changed")


def test_one_tile_alone_has_no_seam_to_measure(scene: Path, slim: Path, tmp_path: Path) -> None:
    """It would be called exact, which nobody has seen."""
    field = write_vector(tmp_path / "a.gpkg", placed(shapely.box(140, 140, 200, 200)))
    asked = options(aoi=field, halo="0")
    manifest = segment(scene, tmp_path / "o.tif", model=slim, options=asked)
    seam = manifest["seam"]
    assert (seam["windows"], seam["exact"], seam["passed"]) == (0, None, None)
    assert "tiles that ran meet" in seam["reason"]
    assert manifest["tiles"]["skipped"] == 19


def test_what_lies_elsewhere_is_not_read(slim: Path, tmp_path: Path) -> None:
    """A field in a scene of a terabyte would take a terabyte's time."""
    image_CYX = np.stack([texture((900, 400), seed=seed) for seed in (1, 2, 3)])
    scene = write_raster(tmp_path / "cut.tif", image_CYX, compress="deflate", interleave="pixel")
    whole = scene.read_bytes()
    scene.write_bytes(whole[: len(whole) * 2 // 3])
    field = write_vector(tmp_path / "a.gpkg", placed(shapely.box(100, 100, 300, 250)))
    asked = options(aoi=field)
    manifest = segment(scene, tmp_path / "o.tif", model=slim, options=asked)
    assert (manifest["status"], manifest["seam"]["passed"]) == ("done", True)
    manifest = segment(scene, tmp_path / "p.tif", model=slim, options=options(allow_failed=99))
    assert manifest["tiles"]["failed"] > 0


def test_a_run_that_was_stopped_goes_on_with_the_tiles_that_are_left(
    scene: Path, slim: Path, fields: Path, tmp_path: Path
) -> None:
    """Tiles would be done twice, or all of the scene after all."""
    asked, answers = options(aoi=fields), iter([False] * 3 + [True] * 99)
    segment(scene, tmp_path / "whole.tif", model=slim, options=asked)
    output = tmp_path / "o.tif"
    first = segment(scene, output, model=slim, options=asked, stop=lambda: next(answers))
    assert first["status"] == "interrupted"
    assert first["tiles"]["done"] < first["tiles"]["total"]
    second = segment(scene, output, model=slim, options=asked)
    assert second["status"] == "done"
    assert file_digest(output) == file_digest(tmp_path / "whole.tif")
    assert segment(scene, output, model=slim, options=asked) == json.loads(
        Path(f"{output}.run/manifest.json").read_text()
    )


def test_other_polygons_are_another_run(
    scene: Path, slim: Path, fields: Path, tmp_path: Path, command: Command
) -> None:
    """Last week's fields would be handed out for this week's."""
    output, path = tmp_path / "o.tif", tmp_path / "a.gpkg"
    write_vector(path, placed(FIELDS[0]))
    answer = command.segment(scene, output, "--crf", "off", "--tile", 128, "--aoi", path)
    assert answer.code == 0, answer.err
    before = file_digest(output)
    write_vector(path, placed(FIELDS[1]))
    again = command.segment(scene, output, "--crf", "off", "--tile", 128, "--aoi", path)
    again.refuses(output, "was not made by this command")
    assert file_digest(output) == before


def test_the_mean_of_the_scene_is_that_of_all_of_it(
    scene: Path, fields: Path, tmp_path: Path
) -> None:
    """A field would be seen against itself, and get other labels than with the scene around it."""
    pooled = Architecture(
        family="v3", backbone="slim", dims=2, output_stride=8, rates=(1, 2), image_pooling=True
    )
    model = new_bundle(tmp_path / "pooled", architecture=pooled, bands=3, classes=4, seed=3).path
    asked = {"context": "scene", "tile": 256}
    segment(scene, tmp_path / "whole.tif", model=model, options=options(**asked))
    part = segment(scene, tmp_path / "part.tif", model=model, options=options(**asked, aoi=fields))
    wanted, all_YX = inside(SHAPE, *FIELDS), labels_of(tmp_path / "whole.tif")
    assert np.array_equal(labels_of(tmp_path / "part.tif"), np.where(wanted, all_YX, 255))
    assert part["scene_mean"] is not None


def test_a_mask_is_the_area_of_a_scan(
    volume: Path, slim3d: Path, tmp_path: Path, command: Command
) -> None:
    """An organ in a scan would cost the scan."""
    scan = nib.load(volume)
    mask = np.zeros(scan.shape, np.uint8)
    mask[5:40, 20:45, 10:31] = 1
    path = tmp_path / "organ.nii.gz"
    nib.save(nib.Nifti1Image(mask, scan.affine), path)
    whole, part = tmp_path / "whole.nii.gz", tmp_path / "part.nii.gz"
    segment(volume, whole, model=slim3d, options=options(tile=32))
    manifest = segment(volume, part, model=slim3d, options=options(tile=32, aoi=path))
    found, wanted = (np.asarray(nib.load(p).dataobj) for p in (part, whole))
    assert np.array_equal(found[mask == 1], wanted[mask == 1])
    assert (found[mask == 0] == 255).all()
    assert 0 < manifest["tiles"]["skipped"] < manifest["tiles"]["total"]
    assert manifest["seam"]["passed"] is True
    planned = plan(volume, model=slim3d, options=options(tile=32, aoi=path))
    assert planned["tiles_outside"] == manifest["tiles"]["skipped"]
    again = segment(volume, part, model=slim3d, options=options(tile=32, aoi=path, fresh=True))
    assert again["output_sha256"] == manifest["output_sha256"]
    segment(volume, part, model=slim3d, options=options(tile=32, aoi=path))
    assert not Path(f"{part}.run/scratch").exists()
    nib.save(nib.Nifti1Image(mask, scan.affine + np.eye(4, k=3)), tmp_path / "moved.nii.gz")
    nib.save(nib.Nifti1Image(mask[1:], scan.affine), tmp_path / "cut.nii.gz")
    for name, word in (("moved.nii.gz", "apart"), ("cut.nii.gz", "differ in shape")):
        answer = command.segment(
            volume, tmp_path / "o.nii.gz", "--aoi", tmp_path / name, model=slim3d
        )
        answer.refuses(name, word)
    nib.save(nib.Nifti1Image(mask * 0, scan.affine), tmp_path / "empty.nii.gz")
    line = (volume, tmp_path / "o.nii.gz", "--aoi", tmp_path / "empty.nii.gz")
    command.segment(*line, model=slim3d).refuses("empty.nii.gz", "lies inside")
    assert not (tmp_path / "o.nii.gz.run").exists()
    raster = write_raster(tmp_path / "a.tif", texture((1, 8, 8), seed=1))
    line = (volume, tmp_path / "o.nii.gz", "--aoi", raster)
    command.segment(*line, model=slim3d).refuses("a.tif", "differ in shape")


def test_a_mask_may_be_stored_in_another_order_than_the_scan(volume: Path, tmp_path: Path) -> None:
    """Converters turn DICOM's rows around: their masks would not fit the series they came from."""
    scan = nib.load(volume)
    mask = np.zeros(scan.shape, np.uint8)
    mask[5:40, 20:45, 10:31] = 1
    image = nib.Nifti1Image(mask, scan.affine)
    turned = image.as_reoriented([[2, -1], [0, 1], [1, -1]])
    nib.save(image, tmp_path / "mask.nii")
    nib.save(turned, tmp_path / "turned.nii")
    info = NiftiSource(volume).info
    areas = [open_aoi(tmp_path / f"{n}.nii", info, scratch=None).area for n in ("mask", "turned")]
    inside_S, turned_S = (area.inside(Region.whole(info.shape)) for area in areas)
    assert inside_S.any()
    assert np.array_equal(inside_S, turned_S)


SMALL = shapely.box(10.6, 10.6, 11.4, 11.4)
REFUSED: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "far away": (
        lambda f: write_vector(f / "a.gpkg", placed(shapely.box(5000, 0, 5100, 50))),
        ("a.gpkg", "lies inside"),
    ),
    "between centres": (
        lambda f: write_vector(f / "a.gpkg", placed(SMALL)), ("a.gpkg", "lies inside"),
    ),
    "missing": (lambda f: f / "none.gpkg", ("none.gpkg", "not a file")),
    "a raster": (
        lambda f: write_raster(f / "a.tif", texture((1, 8, 8), seed=1)), ("a.tif", "polygons"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_an_area_that_means_nothing_here_is_refused_before_anything_is_written(
    make: Callable[[Path], Path],
    words: tuple[str, ...],
    scene: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    """A night's run would end with a mask of nodata."""
    (tmp_path / "out").mkdir()
    answer = command.segment(scene, tmp_path / "out/o.tif", "--aoi", make(tmp_path))
    answer.refuses(*words)
    assert not list((tmp_path / "out").iterdir())


def test_one_lattice_under_the_scene_and_an_area_are_refused(
    scene: Path, fields: Path, tmp_path: Path, command: Command
) -> None:
    """The lattice would lack what lies around the area, and give other labels in it."""
    crf = tmp_path / "crf.yaml"
    crf.write_text("{scope: scene, smoothness: {weight: 3, position: 3}}")
    answer = command.segment(scene, tmp_path / "o.tif", "--aoi", fields, "--crf", crf)
    answer.refuses("--aoi", "scope scene", "scope tile")


def test_a_batch_watches_one_region_in_many_scenes(
    scene: Path, volume: Path, slim: Path, slim3d: Path, fields: Path, tmp_path: Path
) -> None:
    """A scene of another place would end the batch, or be called empty without a word."""
    archive, area = tmp_path / "in", tmp_path / "a.gpkg"
    archive.mkdir()
    (archive / "here.tif").symlink_to(scene)
    (archive / "scan.nii.gz").symlink_to(volume)
    image_CYX = np.stack([texture((90, 90), seed=seed) for seed in (1, 2, 3)])
    write_raster(archive / "there.tif", image_CYX)
    write_vector(area, placed(FIELDS[1]))

    def run() -> dict[str, Any]:
        asked = options(aoi=area)
        return batch([archive], tmp_path / "out", models=[slim, slim3d], options=asked)

    rows = {row["id"]: row for row in run()["cases"]}
    assert [rows[name]["status"] for name in ("here", "there", "scan")] == [
        "done", "quarantined", "quarantined",
    ]  # fmt: skip
    assert "lies inside" in rows["there"]["reason"]
    assert "mask" in rows["scan"]["reason"]
    segment(scene, tmp_path / "alone.tif", model=slim, options=options(aoi=area))
    alone = labels_of(tmp_path / "alone.tif")
    assert np.array_equal(labels_of(tmp_path / "out/here.tif"), alone)
    assert not any(row["computed"] for row in run()["cases"])
    write_vector(area, placed(shapely.box(20, 20, 80, 80)))
    rows = {row["id"]: row for row in run()["cases"]}
    assert rows["there"]["status"] == "done"
    assert rows["here"]["computed"]


def test_the_park_of_a_real_landsat_scene_is_what_rasterio_cuts_out(
    data: Path, tmp_path: Path
) -> None:
    """Made-up polygons have neither a datum of their own nor thousands of corners."""
    scene, park = data / "geo/zion_landsat8/landsat_b2345.vrt", data / "geo/zion_landsat8/zion.gpkg"
    model = fresh(tmp_path / "slim", bands=4).path
    asked = options(tile=256, aoi=park, any_resolution=True)
    manifest = segment(scene, tmp_path / "o.tif", model=model, options=asked)
    meta, _, (wkb,), _ = pyogrio.raw.read(park, columns=[])
    with rasterio.open(scene) as file, rasterio.open(tmp_path / "o.tif") as mask:
        border = transform_geom(meta["crs"], file.crs, shapely.from_wkb(wkb).__geo_interface__)
        wanted = geometry_mask([border], file.shape, file.transform, invert=True)
        valid = file.dataset_mask() > 0
        found = mask.read(1) != 255
    assert 0.2 < wanted.mean() < 0.8
    assert (found != (wanted & valid)).sum() <= 2
    assert manifest["tiles"]["skipped"] > 0
    assert manifest["seam"]["passed"] is True
