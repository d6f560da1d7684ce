"""Vector files: what is read of them, where it lies on a raster, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import shapely
from polygons import inside, placed, write_vector
from rasterio.transform import from_origin
from scenes import texture, write_raster

from adapters.geotiff import GeoTiffSource
from adapters.polygon_file import read_polygons
from pipeline.domain import ImageInfo, Region
from pipeline.errors import SourceError

SHAPE = (300, 400)
IMAGE_CYX = texture((1, *SHAPE), seed=1)
BLOB = shapely.Point(180.2, 140.7).buffer(90)
BOX = shapely.box(300.2, 200.2, 350.7, 290.8)
BOW = shapely.Polygon([(50, 50), (250, 250), (250, 50), (50, 250)])


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> ImageInfo:
    path = write_raster(
        tmp_path_factory.mktemp("scene") / "scene.tif", texture((1, *SHAPE), seed=1)
    )
    return GeoTiffSource(path).info


@pytest.mark.parametrize("name", ["a.geojson", "a.gpkg", "a.shp", "a.fgb", "a.gml"])
def test_polygons_of_any_format_and_crs_lie_where_they_were_drawn(
    name: str, info: ImageInfo, tmp_path: Path
) -> None:
    """Axes would be swapped, or degrees taken for metres."""
    crs = "EPSG:4326" if name.endswith(("json", "gml")) else "EPSG:3035"
    shapes = [placed(BLOB, crs=crs), placed(BOX, crs=crs)]
    area = read_polygons(write_vector(tmp_path / name, *shapes, crs=crs)).on(info)
    found, wanted = area.inside(Region.whole(SHAPE)), inside(SHAPE, BLOB, BOX)
    assert 25_000 < wanted.sum() < 35_000
    assert (found != wanted).sum() <= 3  # GeoJSON has 7 digits


def test_parts_that_overlap_are_inside_and_outlines_that_cross_are_told(
    info: ImageInfo, tmp_path: Path
) -> None:
    """What two polygons both cover would be a hole; what was mended, nobody would know."""
    both = shapely.MultiPolygon([BLOB, shapely.box(180, 100, 340, 180)])
    file = read_polygons(write_vector(tmp_path / "a.gpkg", placed(both), placed(BOW)))
    (note,) = file.notes
    assert note.startswith("1 of 3 polygons of a.gpkg cross themselves")
    wanted = inside(SHAPE, *both.geoms, shapely.make_valid(BOW))
    assert np.array_equal(file.on(info).inside(Region.whole(SHAPE)), wanted)
    assert not read_polygons(write_vector(tmp_path / "b.gpkg", placed(BLOB))).notes


def test_a_raster_without_crs_takes_polygons_in_its_pixels(tmp_path: Path) -> None:
    """Scans of microscopes and drones have no CRS: they could have no area either."""
    path = write_raster(
        tmp_path / "plain.tif", texture((1, *SHAPE), seed=1), crs=None, transform=None
    )
    with pytest.warns(UserWarning, match="crs"):
        vector = write_vector(tmp_path / "a.shp", BLOB, crs=None)
    area = read_polygons(vector).on(GeoTiffSource(path).info)
    assert np.array_equal(area.inside(Region.whole(SHAPE)), inside(SHAPE, BLOB))


def test_polygons_far_away_need_no_place_in_the_scenes_crs(info: ImageInfo, tmp_path: Path) -> None:
    """A file of the whole world would be refused for its poles."""
    pole = shapely.box(-180, -90, 180, -60)
    path = write_vector(tmp_path / "a.geojson", pole, placed(BOX, crs="EPSG:4326"), crs="EPSG:4326")
    area = read_polygons(path).on(info)
    assert np.array_equal(area.inside(Region.whole(SHAPE)), inside(SHAPE, BOX))
    assert len(area.polygons) == 1


def test_a_scene_astride_180_degrees_meets_polygons_on_both_sides(tmp_path: Path) -> None:
    """Its extent in degrees goes from 179.9 to -179.9, between which no polygon would lie."""
    at_180 = from_origin(166021 - 20000, 15000, 100, 100)
    path = write_raster(tmp_path / "fiji.tif", IMAGE_CYX, crs="EPSG:32601", transform=at_180)
    sides = shapely.box(179.9, -0.05, 180, 0.05), shapely.box(-180, -0.05, -179.9, 0.05)
    far = shapely.box(0, -0.05, 1, 0.05)
    vector = write_vector(tmp_path / "a.geojson", *sides, far, crs="EPSG:4326")
    area = read_polygons(vector).on(GeoTiffSource(path).info)
    whole = inside(SHAPE, shapely.box(200 - 111.32, 150 - 55.4, 200 + 111.32, 150 + 55.4))
    assert len(area.polygons) == 2
    assert (area.inside(Region.whole(SHAPE)) != whole).mean() < 0.01


def test_a_digest_is_of_polygons_and_crs_alone(tmp_path: Path) -> None:
    """Another format of the same would be another run; another CRS would not."""
    first, *others = (
        read_polygons(write_vector(tmp_path / name, polygon, crs=crs)).digest
        for name, polygon, crs in (
            ("a.gpkg", BLOB, "EPSG:32633"), ("b.fgb", BLOB, "EPSG:32633"),
            ("c.gpkg", BLOB, "EPSG:32634"), ("d.gpkg", BOX, "EPSG:32633"),
        )
    )  # fmt: skip
    assert [other == first for other in others] == [True, False, False]


def _text(name: str, text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_text(text)
        return path

    return make


def _two_layers(folder: Path) -> Path:
    write_vector(folder / "a.gpkg", placed(BOX), layer="fields")
    return write_vector(folder / "a.gpkg", placed(BLOB), layer="roads")


EMPTY = '{"type":"FeatureCollection","features":[]}'
ELSEWHERE = '<OGRVRTDataSource><OGRVRTLayer name="a"><SrcDataSource>http://a/b</SrcDataSource>'
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "none.gpkg", "not a file"),
    "a folder": (lambda folder: folder, "not a file"),
    "nothing in it": (_text("a.geojson", ""), "could not be read"),
    "no vector file": (_text("a.gpkg", "hello"), "could not be read"),
    "cut off": (_text("a.geojson", EMPTY[:-4]), "could not be read"),
    "no feature": (_text("a.geojson", EMPTY), "holds nothing"),
    "points": (lambda f: write_vector(f / "a.gpkg", placed(shapely.Point(1, 1))), "holds Point"),
    "a line as well": (
        lambda f: write_vector(f / "a.gpkg", placed(BOX), placed(BOX.exterior)), "holds LineString",
    ),
    "two layers": (_two_layers, "layers fields, roads"),
    "a description of something elsewhere": (_text("a.vrt", ELSEWHERE), "give that file"),
    "polygons of no extent": (
        lambda f: write_vector(f / "a.gpkg", shapely.Polygon()), "holds nothing",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "word"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_inside_is_refused(
    make: Callable[[Path], Path], word: str, tmp_path: Path
) -> None:
    """All of the scene, or none of it, would be nodata without a word."""
    with pytest.raises(SourceError, match=word) as refusal:
        read_polygons(make(tmp_path))
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_crs_on_one_side_alone_is_refused(info: ImageInfo, tmp_path: Path) -> None:
    """Numbers of unknown meaning would be taken for metres."""
    with pytest.warns(UserWarning, match="crs"):
        vector = write_vector(tmp_path / "a.shp", placed(BOX), crs=None)
    with pytest.raises(SourceError, match="has no CRS, the scene has one"):
        read_polygons(vector).on(info)
    plain = write_raster(tmp_path / "plain.tif", IMAGE_CYX, crs=None)
    vector = write_vector(tmp_path / "b.gpkg", placed(BOX))
    with pytest.raises(SourceError, match="has a CRS, the scene has none"):
        read_polygons(vector).on(GeoTiffSource(plain).info)
