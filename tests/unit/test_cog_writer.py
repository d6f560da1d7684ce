"""The COG: the source's grid bit for bit, the store's pixels, and nothing unverified by name."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.rpc import RPC
from rio_cogeo.cogeo import cog_validate

from adapters.cog import CogSpec, encode_cog, verify_cog, write_cog
from adapters.geotiff import GeoTiffSource
from adapters.memory import MemoryStore
from pipeline.domain import Grid, Region
from pipeline.errors import FinishError, SourceError, StoreError

DEFAULT_DATA = Path(__file__).parents[2] / "../shared/data"
GEO = Path(os.environ.get("TERRAVOX_DATA", DEFAULT_DATA)) / "geo"
real_data = pytest.mark.skipif(not GEO.is_dir(), reason=f"needs {GEO}; set TERRAVOX_DATA")


TIE_POINTS, RATIONAL_COEFFICIENTS = 33922, 50844
"""Tags of a TIFF."""


@dataclass(frozen=True, slots=True)
class Look:
    id: int
    name: str
    color: str


CLASSES = (
    Look(0, "water", "#2b6cb0"),
    Look(1, "wheat & <rye>", "#d69e2e"),
    Look(4, "Wald ä", "#276749"),
)
NORTH_UP = rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)
TURNED = rasterio.Affine(17.3, 5, 100, 10, -8.6, 200)
SHAPE = (700, 900)


def write_source(path: Path, *, shape: tuple[int, int] = SHAPE, **grid: Any) -> Path:
    grid = {"crs": "EPSG:32633", "transform": NORTH_UP} | grid
    height, width = shape
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=1, dtype="uint8", **grid
    ):
        return path


def sensed(path: Path, *, crs: str = "EPSG:4326", shift: float = 0.0, twist: float = 0.0) -> Path:
    """A raster as it comes from a sensor: points and polynomials say where it lies, no affine."""
    write_source(path, crs=None, transform=None)
    places = [(0, 0), (0, 899.5), (700, 0), (699.25, 900), (351, 450)]
    points = [
        GroundControlPoint(row=r, col=c, x=8 + c / 3e3 + shift, y=46 - r / 7e3, z=r / 3)
        for r, c in places
    ]
    terms = [1 / 3 + twist, *(n / 7e5 for n in range(19))]
    rpcs = RPC(
        height_off=500.0, height_scale=500.0, lat_off=46.1, lat_scale=0.1, long_off=8.2,
        long_scale=0.1, line_off=350.0, line_scale=350.0, samp_off=450.0, samp_scale=450.0,
        line_num_coeff=terms, line_den_coeff=terms, samp_num_coeff=terms, samp_den_coeff=terms,
    )  # fmt: skip
    with rasterio.open(path, "r+") as file:
        file.gcps, file.rpcs = (points, CRS.from_string(crs) if crs else CRS()), rpcs
    return path


def mask_store(shape: tuple[int, int], *, dtype: str = "uint8") -> MemoryStore:
    """Patches of 20 px of the three classes and nodata."""
    nodata = np.iinfo(dtype).max
    coarse = np.random.default_rng(5).choice([0, 1, 4, nodata], [-(-n // 20) for n in shape])
    store = MemoryStore(shape, dtype=dtype, fill=nodata)
    mask_S = np.kron(coarse, np.ones((20, 20))).astype(dtype)[: shape[0], : shape[1]]
    store.write(Region.whole(shape), mask_S)
    return store


def spec_for(source: Path, *, shape: tuple[int, int] = SHAPE, **change: Any) -> CogSpec:
    grid = Grid(shape=shape, tile=(256, 256), stride=8)
    tags = {"TERRAVOX_FINGERPRINT": "f" * 64}
    spec = CogSpec(source_path=source, grid=grid, dtype="uint8", classes=CLASSES, tags=tags)
    return replace(spec, **change)


def finish(folder: Path, **change: Any) -> Path:
    source = write_source(folder / "source.tif")
    spec = spec_for(source, **change)
    write_cog(
        folder / "mask.tif", store=mask_store(SHAPE, dtype=spec.dtype), spec=spec, scratch=folder
    )
    return folder / "mask.tif"


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_the_file_is_a_valid_cog_with_palette_nodata_and_tags(tmp_path: Path, dtype: Any) -> None:
    """Broken: a mask that viewers show in gray, or whose nodata they show as a class."""
    path = finish(tmp_path, dtype=dtype)
    assert cog_validate(path, strict=True, quiet=True) == (True, [], [])
    with rasterio.open(path) as file:
        assert (file.dtypes, file.nodata) == ((dtype,), np.iinfo(dtype).max)
        assert file.colorinterp == (ColorInterp.palette,)
        assert file.colormap(1)[1] == (0xD6, 0x9E, 0x2E, 255)
        assert file.colormap(1)[file.nodata][3] == 0
        assert file.block_shapes == [(512, 512)]
        tags = file.tags()
        assert tags["TERRAVOX_FINGERPRINT"] == "f" * 64
        assert json.loads(tags["TERRAVOX_CLASSES"])[2] == {
            "id": 4,
            "name": "Wald ä",
            "color": "#276749",
        }
        assert tags["AREA_OR_POINT"] == "Area"
        assert file.compression.name == "deflate"
        assert "PREDICTOR" not in file.tags(ns="IMAGE_STRUCTURE")


def test_a_reader_without_gdal_sees_the_same_pixels(tmp_path: Path) -> None:
    """Broken: a file that only the library that wrote it can read."""
    with Image.open(finish(tmp_path)) as picture:
        np.testing.assert_array_equal(np.asarray(picture), mask_store(SHAPE).array)


def test_overviews_take_the_most_frequent_class(tmp_path: Path) -> None:
    """Broken: overviews that invent classes between the classes, or keep every stray pixel."""
    store = mask_store(SHAPE)
    clean = store.array[::2, ::2].copy()
    for row, column in ((0, 0), (2, 1), (5, 4), (7, 7)):  # each corner of an overview pixel
        store.array[row::8, column::8] = 1
    spec = spec_for(write_source(tmp_path / "source.tif"))
    write_cog(tmp_path / "mask.tif", store=store, spec=spec, scratch=tmp_path)
    with rasterio.open(tmp_path / "mask.tif", overview_level=0) as file:
        overview = file.read(1)
    seen = clean != 255  # nodata has no vote
    np.testing.assert_array_equal(overview[seen], clean[seen])
    assert set(np.unique(overview)) == {0, 1, 4, 255}


def test_two_writes_are_the_same_bytes(tmp_path: Path) -> None:
    """Broken: a clock or a random id in the file, so that no rerun can be compared."""
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = finish(tmp_path / name)
        sidecar = path.with_name("mask.tif.aux.xml")
        digests.append([hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, sidecar)])
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "grid",
    [
        {},
        {"transform": TURNED},
        {"crs": None},
        {"crs": None, "transform": rasterio.Affine.identity()},
        {"transform": rasterio.Affine(300.0379266750948, 0, 101985.1, 0, 300.04178272980503, 7.7)},
        {"crs": "EPSG:4326", "transform": rasterio.Affine(1 / 3600, 0, 10, 0, -1 / 3600, 60)},
        {"crs": "+proj=laea +lat_0=47.3 +lon_0=9.1 +ellps=bessel +units=us-ft +type=crs"},
    ],
    ids=["utm", "rotated", "no crs", "nothing", "south up", "degrees", "custom crs"],
)
def test_crs_and_affine_are_the_sources_bit_for_bit(tmp_path: Path, grid: dict[str, Any]) -> None:
    """Broken: a mask that lies half a pixel, or a rounding, beside its image."""
    shape = (15, 10)
    source = write_source(tmp_path / "source.tif", shape=shape, **grid)
    target = tmp_path / "mask.tif"
    write_cog(target, store=mask_store(shape), spec=spec_for(source, shape=shape), scratch=tmp_path)
    with rasterio.open(source) as before, rasterio.open(target) as after:
        assert tuple(after.transform) == tuple(before.transform)
        assert after.crs == before.crs
        assert after.shape == before.shape


@real_data
@pytest.mark.parametrize(
    "name", ["rasterio_tests/RGB2.byte.tif", "zion_landsat8/landsat_b2345.vrt"]
)
def test_real_rasters_give_a_mask_on_their_own_grid(tmp_path: Path, name: str) -> None:
    """Broken: a CRS that only synthetic files survive."""
    with rasterio.open(GEO / name) as source:
        shape, crs, transform = source.shape, source.crs, source.transform
    spec = spec_for(GEO / name, shape=shape)
    target = tmp_path / "mask.tif"
    write_cog(target, store=mask_store(shape), spec=spec, scratch=tmp_path)
    assert cog_validate(target, strict=True, quiet=True)[0]
    with rasterio.open(target) as file:
        assert (file.shape, file.crs, file.transform) == (shape, crs, transform)


@pytest.mark.parametrize("crs", ["EPSG:4326", ""], ids=["degrees", "no CRS"])
def test_control_points_and_rpcs_are_the_sources(tmp_path: Path, crs: str) -> None:
    """A radar scene has no affine: its mask would lie nowhere."""
    spec, store = spec_for(sensed(tmp_path / "source.tif", crs=crs)), mask_store(SHAPE)
    write_cog(tmp_path / "mask.tif", store=store, spec=spec, scratch=tmp_path)
    with rasterio.open(spec.source_path) as source, rasterio.open(tmp_path / "mask.tif") as mask:
        assert (mask.crs, mask.transform) == (source.crs, source.transform)
        assert mask.gcps[1] == source.gcps[1] == (crs or None)
        assert [p.asdict() for p in mask.gcps[0]] == [p.asdict() for p in source.gcps[0]]
        assert mask.rpcs == source.rpcs
    valid, errors, _ = cog_validate(tmp_path / "mask.tif")
    assert valid, errors
    seen = [Image.open(path) for path in (spec.source_path, tmp_path / "mask.tif")]
    for tag in (TIE_POINTS, RATIONAL_COEFFICIENTS):  # as a reader without GDAL finds them
        wanted, found = (image.tag_v2[tag] for image in seen)
        np.testing.assert_allclose(found, wanted, rtol=1e-13)
    for name, change in (("gcps", {"shift": 1e-9}), ("rpcs", {"twist": 1e-9})):
        other = spec_for(sensed(tmp_path / f"{name}.tif", crs=crs, **change))
        with pytest.raises(FinishError, match=f"{name} is"):
            verify_cog(tmp_path / "mask.tif", store=store, spec=other)


def test_an_affine_comes_before_control_points(tmp_path: Path) -> None:
    """A GeoTIFF holds the one or the others; a VRT may have both."""
    source = tmp_path / "both.vrt"
    rasterio.shutil.copy(sensed(tmp_path / "source.tif"), source, driver="VRT")
    words = "<GeoTransform>500000, 10, 0, 5000000, 0, -10</GeoTransform>"
    source.write_text(source.read_text().replace("<GCPList", f"{words}<GCPList"))
    with rasterio.open(source) as file:
        assert (file.transform, len(file.gcps[0])) == (NORTH_UP, 5)
    spec = spec_for(source)
    write_cog(tmp_path / "mask.tif", store=mask_store(SHAPE), spec=spec, scratch=tmp_path)
    with rasterio.open(tmp_path / "mask.tif") as mask:
        assert (mask.transform, mask.gcps[0]) == (NORTH_UP, [])
    (note,) = (n for n in GeoTiffSource(source).info.notes if "control points" in n)
    assert "left out" in note


def test_a_pixel_that_differs_is_named(tmp_path: Path) -> None:
    """Broken: a verification that samples, and misses what it did not look at."""
    path, store = finish(tmp_path), mask_store(SHAPE)
    store.array[699, 899] ^= 1
    with pytest.raises(
        FinishError, match=r"pixel \(699, 899\) is \d+, the store has \d+; 1 pixels"
    ):
        verify_cog(path, store=store, spec=spec_for(tmp_path / "source.tif"))


def test_a_shift_by_one_pixel_is_found(tmp_path: Path) -> None:
    """Broken: a mask written one column to the right of its image."""
    store, shifted = mask_store(SHAPE), mask_store(SHAPE)
    shifted.array[...] = np.roll(store.array, 1, axis=1)
    spec = spec_for(write_source(tmp_path / "source.tif"))
    encode_cog(tmp_path / "mask.tif", store=shifted, spec=spec, scratch=tmp_path)
    with pytest.raises(FinishError, match="the store has"):
        verify_cog(tmp_path / "mask.tif", store=store, spec=spec)


@pytest.mark.parametrize(
    ("grid", "named"),
    [
        ({"transform": rasterio.Affine(10, 0, 5e5 + 10, 0, -10, 5e6)}, "transform"),
        ({"transform": rasterio.Affine(10, 0, 5e5 + 1e-9, 0, -10, 5e6)}, "transform"),
        ({"crs": "EPSG:32634"}, "crs"),
        ({"crs": None}, "crs"),
    ],
    ids=["one pixel", "a nanometre", "next zone", "crs lost"],
)
def test_another_geometry_is_found(tmp_path: Path, grid: dict[str, Any], named: str) -> None:
    """Broken: the right pixels in the wrong place, which no pixel comparison sees."""
    store, source = mask_store(SHAPE), write_source(tmp_path / "source.tif")
    wrong = write_source(tmp_path / "wrong.tif", **grid)
    encode_cog(tmp_path / "mask.tif", store=store, spec=spec_for(wrong), scratch=tmp_path)
    with pytest.raises(FinishError, match=f"{named} is"):
        verify_cog(tmp_path / "mask.tif", store=store, spec=spec_for(source))


def test_another_type_is_found(tmp_path: Path) -> None:
    """Broken: a mask of a type, hence nodata, that the plan did not promise."""
    path = finish(tmp_path)
    spec = spec_for(tmp_path / "source.tif", dtype="uint16")
    with pytest.raises(FinishError, match="dtypes is"):
        verify_cog(path, store=mask_store(SHAPE), spec=spec)


class FlickeringStore(MemoryStore):
    """Returns another corner pixel at every read, as bad memory or a late writer would."""

    def read(self, region: Region) -> Any:
        self.array[0, 0] ^= 1
        return super().read(region)


def test_nothing_takes_the_final_name_unverified(tmp_path: Path) -> None:
    """Broken: a wrong file under its final name, or litter of the failed one."""
    spec = spec_for(write_source(tmp_path / "source.tif"))
    spec = replace(spec, grid=Grid(shape=SHAPE, tile=(1024, 1024), stride=8))
    store = FlickeringStore(SHAPE, dtype="uint8", fill=4)
    with pytest.raises(FinishError, match=r"pixel \(0, 0\)"):
        write_cog(tmp_path / "mask.tif", store=store, spec=spec, scratch=tmp_path)
    assert os.listdir(tmp_path) == ["source.tif"]


class CountingStore(MemoryStore):
    largest = 0

    def read(self, region: Region) -> Any:
        self.largest = max(self.largest, region.size)
        return super().read(region)


def test_no_more_than_a_core_is_read_at_once(tmp_path: Path) -> None:
    """Broken: the whole mask in memory, which for a large scene does not fit."""
    store = CountingStore(SHAPE, dtype="uint8", fill=4)
    spec = spec_for(write_source(tmp_path / "source.tif"))
    write_cog(tmp_path / "mask.tif", store=store, spec=spec, scratch=tmp_path)
    assert store.largest == 256 * 256


def test_a_source_of_another_shape_is_refused(tmp_path: Path) -> None:
    """Broken: a source replaced during the run that lends its grid to a foreign mask."""
    spec = spec_for(write_source(tmp_path / "source.tif", shape=(10, 10)))
    with pytest.raises(SourceError, match="replaced"):
        write_cog(tmp_path / "m.tif", store=mask_store(SHAPE), spec=spec, scratch=tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """Broken: a traceback of GDAL's for a missing folder or a full disk."""
    spec = spec_for(write_source(tmp_path / "source.tif"))
    target = tmp_path / "gone" / "mask.tif"
    with pytest.raises(StoreError, match=r"mask\.tif\S* could not be written") as caught:
        write_cog(target, store=mask_store(SHAPE), spec=spec, scratch=tmp_path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["source.tif"]


@pytest.mark.parametrize("ids", [(255,), (3, 3), (-1,)])
def test_class_ids_that_a_mask_cannot_hold_are_refused(ids: tuple[int, ...]) -> None:
    """Broken: a class drawn as nodata, or two classes as one."""
    looks = tuple(Look(number, "x", "#000000") for number in ids)
    with pytest.raises(FinishError, match="class ids"):
        spec_for(Path("source.tif"), classes=looks)


def libgdal() -> ctypes.CDLL:
    """The library that rasterio carries: it reads attribute tables, rasterio does not."""
    found = sorted((Path(rasterio.__file__).parents[1] / "rasterio.libs").glob("libgdal*"))
    if not found:
        pytest.skip("needs a rasterio wheel that carries libgdal")
    library = ctypes.CDLL(str(found[0]))
    for name in (
        "GDALOpen",
        "GDALGetRasterBand",
        "GDALGetDefaultRAT",
        "GDALGetRasterCategoryNames",
    ):
        getattr(library, name).restype = ctypes.c_void_p
    library.GDALRATGetValueAsString.restype = ctypes.c_char_p
    return library


def test_gdal_reads_the_class_names_and_the_attribute_table(tmp_path: Path) -> None:
    """Broken: a sidecar that is XML but not GDAL's, so that QGIS shows bare numbers."""
    path, gdal = finish(tmp_path), libgdal()
    file = gdal.GDALOpen(str(path).encode(), 0)
    # The driver loads its sidecar with the georeferencing, which every viewer asks for first.
    assert gdal.GDALGetGeoTransform(ctypes.c_void_p(file), (ctypes.c_double * 6)()) == 0
    band = ctypes.c_void_p(gdal.GDALGetRasterBand(ctypes.c_void_p(file), 1))
    names = ctypes.cast(gdal.GDALGetRasterCategoryNames(band), ctypes.POINTER(ctypes.c_char_p))
    assert [names[i] for i in range(6)] == [
        b"water",
        CLASSES[1].name.encode(),
        b"",
        b"",
        "Wald ä".encode(),
        None,
    ]
    table = ctypes.c_void_p(gdal.GDALGetDefaultRAT(band))
    rows = [
        [gdal.GDALRATGetValueAsString(table, row, column) for column in range(5)]
        for row in range(gdal.GDALRATGetRowCount(table))
    ]
    assert rows[2] == [b"4", "Wald ä".encode(), b"39", b"103", b"73"]
    assert [gdal.GDALRATGetUsageOfCol(table, column) for column in range(5)] == [5, 2, 6, 7, 8]
    assert gdal.GDALRATGetTableType(table) == 0  # thematic
    gdal.GDALClose(ctypes.c_void_p(file))
