"""GeoTiffSource: what counts as valid, what things are called, and how bad files end."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp

from adapters.geotiff import GeoTiffSource
from pipeline.domain import Region
from pipeline.errors import SourceError, SourceReadError

DEFAULT_DATA = Path(__file__).parents[2] / "../shared/data"
GEO = Path(os.environ.get("TERRAVOX_DATA", DEFAULT_DATA)) / "geo"
real_data = pytest.mark.skipif(not GEO.is_dir(), reason=f"needs {GEO}; set TERRAVOX_DATA")

NORTH_UP = rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)


def write(path: Path, image_CS: np.ndarray, **profile: object) -> Path:
    count, height, width = image_CS.shape
    grid = {"crs": "EPSG:32633", "transform": NORTH_UP}
    shape = {"count": count, "height": height, "width": width, "dtype": image_CS.dtype}
    with rasterio.open(path, "w", driver="GTiff", **(shape | grid | profile)) as file:
        file.write(image_CS)
    return path


def whole(source: GeoTiffSource) -> Region:
    return Region.whole(source.info.shape)


def valid(path: Path) -> np.ndarray:
    source = GeoTiffSource(path)
    return source.read(whole(source)).valid_S


@real_data
@pytest.mark.parametrize("name", ["RGB.byte.tif", "RGB2.byte.tif", "alpha.tif", "float_nan.tif"])
def test_the_valid_mask_is_gdals_own_mask_of_every_channel(name: str) -> None:
    """Broken: a nodata collar, an external mask, alpha or NaN that reaches the network as data."""
    path = GEO / "rasterio_tests" / name
    with rasterio.open(path) as file:
        channels = [b for b in file.indexes if file.colorinterp[b - 1] != ColorInterp.alpha]
        expected = (file.read_masks(channels) != 0).all(axis=0)
    assert not expected.all()
    np.testing.assert_array_equal(valid(path), expected)


@real_data
def test_an_alpha_band_is_no_channel() -> None:
    """Broken: transparency fed to the network as a fourth band."""
    info = GeoTiffSource(GEO / "rasterio_tests/alpha.tif").info
    assert info.channels == ("red", "green", "blue")
    assert any("alpha" in note for note in info.notes)


def test_a_described_fourth_band_is_a_channel_though_gdal_calls_it_alpha(tmp_path: Path) -> None:
    """Broken: near infrared taken for transparency, as GDAL marks band 4 of any new 8-bit file."""
    path = write(tmp_path / "a.tif", np.zeros((4, 3, 3), np.uint8))
    with rasterio.open(path, "r+") as file:
        assert file.colorinterp[3] == ColorInterp.alpha
        file.descriptions = ("blue", "green", "red", "nir")
    source = GeoTiffSource(path)
    assert source.info.channels == ("blue", "green", "red", "nir")
    assert source.read(whole(source)).valid_S.all()


def test_an_internal_mask_counts_beside_nodata(tmp_path: Path) -> None:
    """Broken: one of the two ignored; GDAL itself looks at one only."""
    image_CS = np.ones((2, 4, 4), np.uint8)
    image_CS[1, 0, 0] = 9
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        path = write(tmp_path / "a.tif", image_CS, nodata=9)
        with rasterio.open(path, "r+") as file:
            mask = np.full((4, 4), 255, np.uint8)
            mask[3, 3] = 0
            file.write_mask(mask)
    expected = np.ones((4, 4), bool)
    expected[0, 0] = expected[3, 3] = False
    np.testing.assert_array_equal(valid(path), expected)


@pytest.mark.parametrize(
    ("dtype", "nodata", "hidden"),
    [("Byte", "0.5", False), ("Byte", "-256", False), ("Int64", "9223372036854775807", True)],
)
def test_nodata_at_the_edge_of_its_type_is_neither_rounded_nor_lost(
    tmp_path: Path, dtype: str, nodata: str, hidden: bool
) -> None:
    """Broken: 0.5 or -256 taken for 0, which punches holes; a nodata that no float can hold."""
    vrt = tmp_path / "a.vrt"
    image = "<NoDataValue>" + nodata + "</NoDataValue>"  # without a source VRT bands read as nodata
    if not hidden:
        write(tmp_path / "b.tif", np.zeros((1, 3, 3), np.uint8))
        name = '<SourceFilename relativeToVRT="1">b.tif</SourceFilename><SourceBand>1</SourceBand>'
        image += f"<SimpleSource>{name}</SimpleSource>"
    band = f'<VRTRasterBand dataType="{dtype}" band="1">{image}</VRTRasterBand>'
    vrt.write_text(f'<VRTDataset rasterXSize="3" rasterYSize="3">{band}</VRTDataset>')
    assert valid(vrt).all() != hidden


@real_data
def test_zion_has_its_band_names_grid_and_nodata_per_band() -> None:
    """Broken: a VRT whose descriptions, nodata or pixel size are lost on the way."""
    info = GeoTiffSource(GEO / "zion_landsat8/landsat_b2345.vrt").info
    assert info.channels == ("blue", "green", "red", "nir")
    assert (info.shape, info.dtype, info.nodata) == ((1000, 1128), "uint16", (65535.0,) * 4)
    assert (info.spacing, info.unit, info.notes) == ((30.0, 30.0), "m", ())
    assert rasterio.CRS.from_wkt(info.crs).to_epsg() == 32612
    assert info.affine == (30.0, 0.0, 301905.0, 0.0, -30.0, 4154085.0)


@real_data
def test_a_rotated_raster_without_crs_says_both() -> None:
    """Broken: a rotation dropped in silence, or metres claimed where nothing is known."""
    info = GeoTiffSource(GEO / "rasterio_tests/rotated.tif").info
    assert info.notes == ("no CRS", "rotated affine")
    assert (info.unit, info.spacing, info.crs) == ("px", (1.0, 1.0), None)
    with rasterio.open(GEO / "rasterio_tests/rotated.tif") as file:
        assert info.affine == tuple(file.transform)[:6]


def test_spacing_of_a_rotated_grid_in_feet_is_the_length_of_its_sides_in_metres(
    tmp_path: Path,
) -> None:
    """Broken: the diagonal terms or the unit forgotten, hence areas wrong by the factor squared."""
    turned = rasterio.Affine(8, -3, 5e5, 6, -4, 5e6)
    path = write(
        tmp_path / "a.tif", np.zeros((1, 3, 3), np.uint8), crs="EPSG:2263", transform=turned
    )
    info = GeoTiffSource(path).info
    assert info.spacing == pytest.approx((5 * 0.3048006096, 10 * 0.3048006096))
    assert info.voxel_size == pytest.approx(14 * 0.3048006096**2)  # it leans: no rectangle of 50


def test_a_scale_that_is_not_applied_is_said(tmp_path: Path) -> None:
    """Broken: reflectances of two processing baselines, an offset apart, are taken for alike."""
    path = write(tmp_path / "a.tif", np.ones((2, 3, 3), np.uint16))
    assert not any("scale" in note for note in GeoTiffSource(path).info.notes)
    with rasterio.open(path, "r+") as file:
        file.offsets = (0, -1000)
    source = GeoTiffSource(path)
    assert any("scale and offset of bands are not applied" in n for n in source.info.notes)
    assert (source.read(Region.whole((3, 3))).image_CS == 1).all()


def test_a_local_system_has_its_unit_of_length(tmp_path: Path) -> None:
    """Broken: an orthomosaic on a building site's own grid is refused, for want of a projection."""
    path = write(
        tmp_path / "a.tif",
        np.zeros((1, 3, 3), np.uint8),
        crs='LOCAL_CS["site",UNIT["foot",0.3048]]',
        transform=rasterio.Affine(2, 0, 0, 0, -2, 0),
    )
    assert GeoTiffSource(path).info.spacing == pytest.approx((0.6096, 0.6096))


def test_degrees_become_metres_at_the_middle_of_the_scene(tmp_path: Path) -> None:
    """Broken: areas in square degrees, or metres of the equator for a scene at 60 degrees north."""
    second = 1 / 3600
    grid = rasterio.Affine(second, 0, 10, 0, -second, 60 + 50 * second)
    path = write(
        tmp_path / "a.tif", np.zeros((1, 100, 100), np.uint8), crs="EPSG:4326", transform=grid
    )
    # A degree at 60 N is 111412 m of latitude and 55800 m of longitude (WGS84 tables).
    assert GeoTiffSource(path).info.spacing == pytest.approx(
        (111412 / 3600, 55800 / 3600), rel=1e-4
    )


@pytest.mark.parametrize(("side", "said"), [(0.1, None), (10.0, "differs by 15.4%")])
def test_pixels_of_unlike_areas_are_said(tmp_path: Path, side: float, said: str | None) -> None:
    """Broken: hectares of a country in degrees are off by a tenth, and nobody knows."""
    grid = rasterio.Affine(side / 100, 1e-9, 10, 1e-9, -side / 100, 60 + side / 2)  # turned
    path = write(
        tmp_path / "a.tif", np.zeros((1, 100, 100), np.uint8), crs="EPSG:4326", transform=grid
    )
    notes = [note for note in GeoTiffSource(path).info.notes if "areas" in note]
    assert len(notes) == bool(said)
    assert not said or notes[0].endswith(said)


def test_rows_along_parallels_have_pixels_of_their_own_size(tmp_path: Path) -> None:
    """Broken: a pixel of Sicily counts as much as one of Lapland."""
    place = rasterio.Affine(0.5, 0, -180, 0, -0.5, 90)
    image = np.zeros((1, 360, 720), np.uint8)
    info = GeoTiffSource(write(tmp_path / "a.tif", image, crs="EPSG:4326", transform=place)).info
    assert info.graticule is not None
    earth_m2 = 510.0656217e12  # of WGS84's ellipsoid, as tables have it
    assert info.graticule.pixel_m2(0, 360) * 360 * 720 == pytest.approx(earth_m2, rel=1e-9)
    # A cell of one degree at the equator, and one at 60 to 61 N, from tables of such cells.
    assert info.graticule.pixel_m2(178, 180) * 4 == pytest.approx(12308.46e6, rel=1e-6)
    north_up = info.graticule.pixel_m2(58, 60)
    middle = math.radians(60.5)  # radii of curvature of the ellipsoid there
    radii = 6378137**2 * (1 - 0.00669438) / (1 - 0.00669438 * math.sin(middle) ** 2) ** 2
    wanted = radii * math.cos(middle) * math.radians(0.5) ** 2
    assert north_up == pytest.approx(wanted, rel=1e-4)
    assert not [note for note in info.notes if "areas" in note]


def test_colours_name_channels_only_where_the_file_states_them(tmp_path: Path) -> None:
    """Broken: a multispectral file whose first band is called gray, or an RGB called 1, 2, 3."""
    rgb = write(tmp_path / "rgb.tif", np.zeros((3, 2, 2), np.uint8), photometric="RGB")
    plain = write(tmp_path / "plain.tif", np.zeros((3, 2, 2), np.uint16))
    assert GeoTiffSource(rgb).info.channels == ("red", "green", "blue")
    assert GeoTiffSource(plain).info.channels == ("1", "2", "3")


def test_an_image_one_pixel_high_reads(tmp_path: Path) -> None:
    """Broken: code that takes a side of one for an empty window."""
    image_CS = np.arange(9, dtype=np.uint8).reshape(1, 1, 9)
    source = GeoTiffSource(write(tmp_path / "a.tif", image_CS))
    np.testing.assert_array_equal(source.read(Region((0, 2), (1, 9))).image_CS, image_CS[..., 2:])


def test_a_truncated_file_fails_where_it_is_cut_and_reads_before(tmp_path: Path) -> None:
    """Broken: a half-copied file that yields zeros, and with them a plausible mask."""
    image_CS = np.random.default_rng(0).integers(0, 255, (1, 512, 512), np.uint8)
    tiles = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate"}
    path = write(tmp_path / "a.tif", image_CS, **tiles)
    os.truncate(path, path.stat().st_size * 6 // 10)
    source = GeoTiffSource(path)
    top = Region((0, 0), (256, 256))
    np.testing.assert_array_equal(source.read(top).image_CS, image_CS[:, :256, :256])
    with pytest.raises(SourceReadError, match=r"rows 256:512, columns 256:512 of .*a\.tif"):
        source.read(Region((256, 256), (512, 512)))


@pytest.mark.parametrize("content", [b"", b"not a raster", b"II*\0", b"<VRTDataset <"])
def test_what_is_no_raster_is_one_line(tmp_path: Path, content: bytes) -> None:
    """Broken: a traceback of GDAL's, or a driver that goes to the network for such a file."""
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"a\.tif") as caught:
        _ = GeoTiffSource(path).info
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_an_affine_that_places_no_pixels_is_refused(tmp_path: Path, bad: float) -> None:
    """Broken: a mask written with NaN coordinates."""
    vrt = tmp_path / "a.vrt"
    band = '<VRTRasterBand dataType="Byte" band="1"/>'
    transform = f"<GeoTransform>0, {bad}, 0, 0, 0, -1</GeoTransform>"
    size = 'rasterXSize="3" rasterYSize="3"'
    vrt.write_text(f"<VRTDataset {size}>{transform}{band}</VRTDataset>")
    with pytest.raises(SourceError, match="geotransform"):
        _ = GeoTiffSource(vrt).info


def test_bands_of_two_types_are_refused(tmp_path: Path) -> None:
    """Broken: a silent cast to the wider type."""
    bands = "".join(
        f'<VRTRasterBand dataType="{t}" band="{b}"/>' for b, t in ((1, "Byte"), (2, "Int16"))
    )
    vrt = tmp_path / "a.vrt"
    vrt.write_text(f'<VRTDataset rasterXSize="3" rasterYSize="3">{bands}</VRTDataset>')
    with pytest.raises(SourceError, match="one real type"):
        _ = GeoTiffSource(vrt).info


def vrt_naming(folder: Path, reference: str, *, relative: int = 1) -> Path:
    path = folder / "a.vrt"
    path.write_text(
        '<VRTDataset rasterXSize="3" rasterYSize="3"><VRTRasterBand dataType="Byte" band="1">'
        f'<SimpleSource><SourceFilename relativeToVRT="{relative}">{reference}</SourceFilename>'
        "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    return path


@pytest.mark.parametrize(
    ("reference", "relative", "why"),
    [
        ("/vsicurl/http://127.0.0.1:9/a.tif", 0, "not a local file"),
        ("wms.xml", 1, "neither a TIFF nor a VRT"),
        ("gone.tif", 1, "not a local file"),
        ("a.vrt", 1, "leads back to itself"),
        ("a.tif", 0, "relative to the working directory"),
    ],
)
def test_a_vrt_leads_only_to_local_rasters(
    tmp_path: Path, reference: str, relative: int, why: str
) -> None:
    """Broken: a file from a stranger that makes a worker fetch an address of the stranger's."""
    (tmp_path / "wms.xml").write_text('<GDAL_WMS><Service name="WMS"/></GDAL_WMS>')
    with pytest.raises(SourceError, match=why):
        _ = GeoTiffSource(vrt_naming(tmp_path, reference, relative=relative)).info


def check_rows(source: GeoTiffSource, image_CS: np.ndarray) -> None:
    for part in whole(source).blocks((4, 1024)):
        rows = slice(part.start[0], part.stop[0])
        np.testing.assert_array_equal(source.read(part).image_CS, image_CS[:, rows])


def test_forked_children_do_not_share_a_handle(tmp_path: Path) -> None:
    """Broken: two processes moving one file offset, each reading the other's bytes."""
    image_CS = np.random.default_rng(0).integers(0, 255, (1, 4096, 1024), np.uint8)
    source = GeoTiffSource(write(tmp_path / "a.tif", image_CS))
    source.read(Region((0, 0), (1, 1)))  # opened here, inherited below without a pickle
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=check_rows, args=(source, image_CS)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=60)
    assert [child.exitcode for child in children] == [0, 0]


def test_the_digest_follows_the_content_and_not_the_path(tmp_path: Path) -> None:
    """Broken: a moved scene that starts anew, or a changed one that resumes the old run."""
    digests = []
    for folder, value, relative in (("one", 1, 0), ("two", 1, 0), ("three", 1, 1), ("four", 2, 0)):
        (tmp_path / folder).mkdir()
        target = write(tmp_path / folder / "b.tif", np.full((1, 3, 3), value, np.uint8))
        name = target.name if relative else str(target)
        vrt = vrt_naming(tmp_path / folder, name, relative=relative)
        digests.append(GeoTiffSource(vrt).digest())
    assert digests[0] == digests[1] == digests[2] != digests[3]


def test_the_digest_sees_an_external_mask_and_ignores_statistics(tmp_path: Path) -> None:
    """Broken: another valid mask under the same fingerprint; a viewer's sidecar forcing a rerun."""
    path = write(tmp_path / "a.tif", np.ones((1, 3, 3), np.uint8))
    before = GeoTiffSource(path).digest()
    path.with_suffix(".tif.aux.xml").write_text(
        '<PAMDataset><PAMRasterBand band="1"><Metadata><MDI key="STATISTICS_MEAN">1</MDI>'
        "</Metadata></PAMRasterBand></PAMDataset>"
    )
    assert GeoTiffSource(path).digest() == before
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as file:
        file.write_mask(np.eye(3, dtype=np.uint8) * 255)
    assert path.with_suffix(".tif.msk").exists()
    assert GeoTiffSource(path).digest() != before


@real_data
def test_a_copy_elsewhere_has_the_digest_of_the_original(tmp_path: Path) -> None:
    """Broken: the digest of a real VRT that holds on one machine alone."""
    for path in (GEO / "zion_landsat8").glob("landsat_*"):
        shutil.copyfile(path, tmp_path / path.name)
    original = GeoTiffSource(GEO / "zion_landsat8/landsat_b2345.vrt").digest()
    assert GeoTiffSource(tmp_path / "landsat_b2345.vrt").digest() == original


def taken_from_files(read: Callable[[], object]) -> int:
    """Bytes that this process reads from files meanwhile, as the kernel counts them."""

    def so_far() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))

    before = so_far()
    read()
    return so_far() - before


@pytest.mark.parametrize(("cache_bytes", "again"), [(2**20, True), (8 * 2**20, False)])
def test_a_source_comes_back_to_as_many_decoded_blocks_as_it_is_told(
    tmp_path: Path, cache_bytes: int, again: bool
) -> None:
    """Neighbouring tiles would decode what they share once each: 2.1 times the scene."""
    noise_CYX = np.random.default_rng(0).integers(0, 256, (1, 2048, 2048), dtype=np.uint8)
    blocks = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"}
    path = write(tmp_path / "scene.tif", noise_CYX, **blocks)
    source = pickle.loads(pickle.dumps(GeoTiffSource(path, cache_bytes)))
    whole = Region.whole(source.info.shape)
    first, second = (taken_from_files(lambda: source.read(whole)) for _ in range(2))
    assert first > 4_000_000
    assert (second > 4_000_000) is again
    assert again or second < 10_000


@pytest.mark.parametrize(("remembered", "again"), [(0, True), (32 * 2**20, False)])
def test_a_reader_that_comes_back_to_nothing_keeps_little_of_what_it_decoded(
    tmp_path: Path, remembered: int, again: bool
) -> None:
    """Each worker would hold blocks that nobody reads twice, beside the tile made of them."""
    noise_CYX = np.random.default_rng(0).integers(0, 256, (6, 2048, 2048), dtype=np.uint8)
    blocks = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "lzw"}
    path = write(tmp_path / "scene.tif", noise_CYX, **blocks)
    source = GeoTiffSource(path).remembering(remembered)
    whole = Region.whole(source.info.shape)
    source.read(whole)
    top = Region((0, 0), (512, 2048))
    assert (taken_from_files(lambda: source.read(top)) > 4_000_000) is again
