"""The mask of a raster as a cloud-optimised GeoTIFF on the source's own grid.

Chunk by chunk from the store into a plain tiled GeoTIFF, from there through GDAL's COG driver, then
opened again and compared with the store before it takes its final name. Memory holds one chunk.
"""

from __future__ import annotations

import glob
import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import rasterio
import rasterio.shutil
from rasterio._err import CPLE_BaseError
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.rpc import RPC
from rasterio.windows import Window

from pipeline.domain import Grid, Region
from pipeline.errors import FinishError, PipelineError, SourceError, StoreError
from pipeline.ports import ArrayStore

_GDAL_ENV = {"GDAL_CACHEMAX": 64 * 2**20}
_GDAL_FAILURES = (RasterioError, CPLE_BaseError, OSError)  # some of GDAL's come unwrapped
_BLOCK_PX = 512

# Labels: no predictor (it makes them larger), overviews that invent no class (the driver would
# interpolate), and 64-bit offsets where compression leaves the size in doubt.
_COG_OPTIONS = {
    "BLOCKSIZE": str(_BLOCK_PX),
    "COMPRESS": "DEFLATE",
    "PREDICTOR": "NO",
    "OVERVIEW_RESAMPLING": "MODE",
    "BIGTIFF": "IF_SAFER",
}


class ClassLook(Protocol):
    """What a file says of a class; the classes of a bundle are such."""

    @property
    def id(self) -> int:
        """The value of its pixels."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def color(self) -> str:
        """``#rrggbb``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CogSpec:
    """What the file is to say beside its pixels."""

    source_path: Path
    """The raster whose CRS and affine the mask takes."""

    grid: Grid
    """The scene and its cores, in which the store is read."""

    dtype: Literal["uint8", "uint16"]

    classes: tuple[ClassLook, ...]

    tags: Mapping[str, str]
    """Written as they are; neither clock nor random id, so that two writes are the same bytes."""

    def __post_init__(self) -> None:
        ids = [look.id for look in self.classes]
        if len(set(ids)) != len(ids) or not all(0 <= number < self.nodata for number in ids):
            raise FinishError(
                f"class ids {ids} do not fit a {self.dtype} mask: they must differ and lie"
                f" between 0 and {self.nodata - 1}"
            )

    @property
    def nodata(self) -> int:
        """255 or 65535: the largest value, which no class may have."""
        return int(np.iinfo(self.dtype).max)


def write_cog(target: Path, *, store: ArrayStore, spec: CogSpec, scratch: Path) -> None:
    """Write ``target`` and its ``.aux.xml``; both appear under their names only when verified.

    Args:
        target: The final path; what is there is replaced.
        store: The mask, (*S) of ``spec.dtype``.
        spec: Geometry, classes and tags.
        scratch: An existing directory for the uncompressed-size intermediate.

    Raises:
        FinishError: the file does not say what the store says.
        StoreError: the file could not be written.
        SourceError: the source's geometry could not be read.
    """
    partial = target.with_name(f".{target.name}.partial.tif")
    sidecar = target.with_name(f"{partial.name}.aux.xml")
    try:
        encode_cog(partial, store=store, spec=spec, scratch=scratch)
        with _as_store_error(target):
            sidecar.write_bytes(_class_sidecar(spec))
            verify_cog(partial, store=store, spec=spec)
            _publish(sidecar, target.with_name(f"{target.name}.aux.xml"))
            _publish(partial, target)
    finally:
        for leftover in target.parent.glob(f"{glob.escape(partial.name)}*"):
            leftover.unlink(missing_ok=True)


def encode_cog(path: Path, *, store: ArrayStore, spec: CogSpec, scratch: Path) -> None:
    """Write the mask to ``path``, unverified. Raises StoreError or SourceError."""
    tiled = scratch / f"{path.name}.tiled.tif"
    try:
        with _as_store_error(path), rasterio.Env(**_GDAL_ENV):
            _write_tiled(tiled, store=store, spec=spec)
            rasterio.shutil.copy(tiled, path, driver="COG", **_COG_OPTIONS)
    finally:
        tiled.unlink(missing_ok=True)


@contextmanager
def _as_store_error(path: Path) -> Iterator[None]:
    try:
        yield
    except PipelineError:
        raise
    except _GDAL_FAILURES as error:
        raise StoreError(
            f"{path} could not be written: {_line(error)};"
            " free the disk and run the same command again"
        ) from error


def verify_cog(path: Path, *, store: ArrayStore, spec: CogSpec) -> None:
    """Open ``path`` afresh and compare geometry with the source, and every pixel with the store.

    Raises:
        FinishError: the first difference, or the file cannot be read.
        SourceError: the source's geometry could not be read.
    """
    wanted = _geometry(spec) | {
        "shape": spec.grid.shape,
        "dtypes": (spec.dtype,),
        "nodata": spec.nodata,
    }
    try:
        with rasterio.Env(**_GDAL_ENV), rasterio.open(path, driver="GTiff", sharing=False) as file:
            found = _places(file) | {"shape": file.shape, "dtypes": file.dtypes}
            found |= {"nodata": file.nodata}
            for name, value in wanted.items():
                if _comparable(found[name]) != _comparable(value):
                    raise FinishError(
                        f"{path}: {name} is {found[name]!r}, the source and the plan say {value!r}"
                    )
            for core in spec.grid.cores():
                _compare(
                    path, core, mask=file.read(1, window=_window(core)), truth=store.read(core)
                )
    except (RasterioError, CPLE_BaseError) as error:
        raise FinishError(f"{path} cannot be read back: {_line(error)}") from error


def _compare(path: Path, core: Region, *, mask: Any, truth: Any) -> None:
    if np.array_equal(mask, truth):
        return
    differs = np.argwhere(mask != truth)
    row, column = differs[0]
    raise FinishError(
        f"{path}: pixel ({core.start[0] + row}, {core.start[1] + column}) is {mask[row, column]},"
        f" the store has {truth[row, column]}; {len(differs)} pixels of {core} differ"
    )


def _write_tiled(path: Path, *, store: ArrayStore, spec: CogSpec) -> None:
    height, width = spec.grid.shape
    places = _geometry(spec)
    points, points_crs = places["gcps"]
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=height,
        width=width,
        count=1,
        dtype=spec.dtype,
        nodata=spec.nodata,
        crs=places["crs"],
        transform=None if points else places["transform"],
        tiled=True,
        blockxsize=_BLOCK_PX,
        blockysize=_BLOCK_PX,
        compress="DEFLATE",
        zlevel=1,
        bigtiff="IF_SAFER",
        sparse_ok=True,  # here alone: not every reader of the product would know a hole as nodata
    ) as file:
        if points:
            file.gcps = [GroundControlPoint(*point) for point in points], points_crs or CRS()
        if places["rpcs"] is not None:
            file.rpcs = places["rpcs"]
        file.write_colormap(1, {look.id: _rgb(look.color) for look in spec.classes})
        file.update_tags(**spec.tags, TERRAVOX_CLASSES=_class_json(spec), AREA_OR_POINT="Area")
        for core in spec.grid.cores():
            file.write(store.read(core), 1, window=_window(core))


def _geometry(spec: CogSpec) -> dict[str, Any]:
    """Where the pixels of the source lie, as a GeoTIFF can say it: by an affine or by points."""
    path = spec.source_path
    try:
        with path.open("rb") as file:
            driver = "VRT" if b"<VRTDataset" in file.read(1024) else "GTiff"
        with rasterio.open(path, driver=driver, sharing=False) as source:
            if source.shape != spec.grid.shape:
                raise SourceError(
                    f"{path} is {source.shape} px, the mask {spec.grid.shape} px;"
                    " was the source replaced during the run?"
                )
            places = _places(source)
            return places if source.transform.is_identity else places | {"gcps": ([], None)}
    except _GDAL_FAILURES as error:
        raise SourceError(f"{path} could not be opened: {_line(error)}") from error


def _places(dataset: Any) -> dict[str, Any]:
    """How a raster says where its pixels lie, as values that can be compared."""
    points, crs = dataset.gcps
    return {
        "crs": dataset.crs,
        "transform": dataset.transform,
        "gcps": ([(p.row, p.col, p.x, p.y, p.z) for p in points], crs or None),
        "rpcs": dataset.rpcs,
    }


def _comparable(value: Any) -> Any:
    """RPCs as a GeoTIFF holds them: an unknown error is -1, and of numbers 15 digits are kept."""
    if not isinstance(value, RPC):
        return value
    facts = {name: -1.0 if fact is None else fact for name, fact in value.to_dict().items()}
    return {name: [f"{n:.15g}" for n in np.atleast_1d(fact)] for name, fact in facts.items()}


def _window(region: Region) -> Window:
    (top, left), (height, width) = region.start, region.shape
    return Window(left, top, width, height)


def _rgb(color: str) -> tuple[int, int, int]:
    digits = bytes.fromhex(color.removeprefix("#"))
    return digits[0], digits[1], digits[2]


def _class_json(spec: CogSpec) -> str:
    looks = [{"id": look.id, "name": look.name, "color": look.color} for look in spec.classes]
    return json.dumps(looks, separators=(",", ":"))


# Field name, type (0 integer, 2 text) and usage codes of a GDAL raster attribute table.
_COLUMNS = (("Value", 0, 5), ("Name", 2, 2), ("Red", 0, 6), ("Green", 0, 7), ("Blue", 0, 8))


def _class_sidecar(spec: CogSpec) -> bytes:
    """GDAL's sidecar with category names and a thematic attribute table, which QGIS reads."""
    root = ET.Element("PAMDataset")
    band = ET.SubElement(root, "PAMRasterBand", band="1")
    names = {look.id: look.name for look in spec.classes}
    categories = ET.SubElement(band, "CategoryNames")
    for number in range(max(names, default=-1) + 1):
        ET.SubElement(categories, "Category").text = names.get(number, "")
    table = ET.SubElement(band, "GDALRasterAttributeTable", tableType="thematic")
    for index, (name, kind, usage) in enumerate(_COLUMNS):
        field = ET.SubElement(table, "FieldDefn", index=str(index))
        for tag, text in (("Name", name), ("Type", kind), ("Usage", usage)):
            ET.SubElement(field, tag).text = str(text)
    for index, look in enumerate(spec.classes):
        row = ET.SubElement(table, "Row", index=str(index))
        for value in (look.id, look.name, *_rgb(look.color)):
            ET.SubElement(row, "F").text = str(value)
    ET.indent(root)
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=False))


def _publish(partial: Path, target: Path) -> None:
    """Give a complete file its name; a power cut finds all of it or nothing."""
    _sync(partial)
    os.replace(partial, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _line(error: BaseException) -> str:
    """The cause in one line; GDAL's own words hang on the binding's exception."""
    return " ".join(str(error.__cause__ or error).split())
