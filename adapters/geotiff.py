"""GeoTIFF, cloud-optimised GeoTIFF and VRT through GDAL, from local files only.

Axes in array names: C channel, S = YX.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from adapters.raster_pixel import area_notes, graticule, pixel_size
from pipeline.domain import ImageInfo, Region
from pipeline.errors import RegionError, SourceError, SourceReadError
from pipeline.ports import Block

CACHE_BYTES = 64 * 2**20
"""Decoded blocks that GDAL keeps, per process; by itself it would keep 5 % of the machine."""

LEAST_CACHE_BYTES = 16 * 2**20
"""Those of a reader that comes back to none: bands and masks that lie in one block are read apart.
"""

_GDAL_FAILURES = (RasterioError, CPLE_BaseError, OSError)  # some of GDAL's come unwrapped
_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WHOLE_FILE_BYTES = 2 * 2**30
_SAMPLE_BYTES = 16 * 2**20
_SAMPLED = "sampled:"

# ``info`` notes a missing CRS once; without this GDAL's binding warns at every open.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bands:
    """Which bands of a file are channels and which only say what is valid; one-based."""

    channels: tuple[int, ...]

    alpha: int | None
    """The band that holds transparency."""

    masked: tuple[int, ...]
    """Channels whose mask is stored, inside the file or beside it; one where all share it."""


class GeoTiffSource:
    """A raster file. Opens it lazily, once in each process and thread; picklable."""

    def __init__(self, path: str | Path, cache_bytes: int = CACHE_BYTES) -> None:
        self._path = Path(path).absolute()  # a worker has another working directory
        self._cache_bytes = cache_bytes
        self._local = threading.local()

    def __reduce__(self) -> tuple[type[GeoTiffSource], tuple[Path, int]]:
        return (GeoTiffSource, (self._path, self._cache_bytes))

    def remembering(self, cache_bytes: int) -> GeoTiffSource:
        """The same file, for a reader that comes back to decoded blocks of that many bytes."""
        return GeoTiffSource(self._path, max(cache_bytes, LEAST_CACHE_BYTES))

    @cached_property
    def info(self) -> ImageInfo:
        """Shape, channels and geometry. Raises SourceError."""
        try:
            with rasterio.Env(**self._env):
                return _describe(self._dataset(), self._bands, path=self._path)
        except _GDAL_FAILURES as error:
            raise SourceError(
                f"{self._path} could not be opened as a GeoTIFF or VRT: {_line(error)};"
                " is the file complete?"
            ) from error

    def unpack(self) -> None:
        """Nothing is packed: any region can be read."""

    def read(self, region: Region) -> Block:
        """Return ``region``: (C, *S) in the native dtype, and (*S) bool; new arrays.

        Raises:
            RegionError: the region is empty or not inside the image.
            SourceReadError: GDAL could not read or decode it.
        """
        info, bands = self.info, self._bands
        if region.ndim != info.ndim or not region.size or region not in Region.whole(info.shape):
            raise RegionError(f"{region} is not inside {self._path}, which is {info.shape} px")
        (top, left), (height, width) = region.start, region.shape
        window = Window(left, top, width, height)
        try:
            with rasterio.Env(**self._env):
                dataset = self._dataset()
                image_CS = dataset.read(list(bands.channels), window=window)
                valid_S = _stored_validity(dataset, bands, window=window)
        except _GDAL_FAILURES as error:
            raise SourceReadError(
                f"rows {top}:{top + height}, columns {left}:{left + width} of {self._path}"
                f" could not be read: {_line(error)}; is the file complete?"
            ) from error
        _drop_nodata(valid_S, image_CS, nodata=info.nodata)
        return Block(image_CS=image_CS, valid_S=valid_S)

    def digest(self) -> str:
        """SHA-256 of pixels, masks and geometry, whatever the files are called.

        Files above 2 GiB count by size, modification time and their first and last 16 MiB; the
        digest then starts with ``sampled:``. Overviews and statistics do not count.

        Raises:
            SourceReadError: a file could not be read.
        """
        # Sidecars (.aux.xml, world files) enter by what they say, not by their bytes: a viewer
        # that adds statistics to them must not make this another source.
        info = self.info
        facts = repr((info.shape, info.channels, info.dtype, info.nodata, info.crs, info.affine))
        facts += _other_places(self._dataset())
        try:
            content = _content_digest(self._path, known={})
        except OSError as error:
            raise SourceReadError(f"{self._path} could not be read: {_line(error)}") from error
        prefix = _SAMPLED if content.startswith(_SAMPLED) else ""
        return prefix + hashlib.sha256(f"{content}\n{facts}".encode()).hexdigest()

    @property
    def _env(self) -> dict[str, Any]:
        return {"GDAL_CACHEMAX": self._cache_bytes, "GDAL_VRT_ENABLE_PYTHON": "NO"}

    @cached_property
    def _bands(self) -> _Bands:
        return _sort_bands(self._dataset(), path=self._path)

    def _dataset(self) -> Any:
        # The pid: a forked child inherits the thread's handle, and must not share its file offset.
        pid, dataset = getattr(self._local, "handle", (None, None))
        if pid != os.getpid():
            dataset = _open(self._path)
            self._local.handle = (os.getpid(), dataset)
        return dataset


def _open(path: Path) -> Any:
    if not path.is_file():
        raise SourceError(f"{path} is not a file; give the path of a GeoTIFF or VRT")
    kind = _kind(path)
    if kind == "VRT":
        _check_references(path, parents=())
    return rasterio.open(path, driver=kind, sharing=False)


def _kind(path: Path) -> Literal["GTiff", "VRT"]:
    """The driver by content, as GDAL does, so that no name can lead to a driver with a network."""
    with path.open("rb") as file:
        start = file.read(1024)
    if start.startswith(_TIFF_MAGICS):
        return "GTiff"
    if b"<VRTDataset" in start:
        return "VRT"
    raise SourceError(f"{path} is neither a TIFF nor a VRT by its content; convert it to GeoTIFF")


def _parse(vrt: Path) -> ET.Element:
    try:
        return ET.parse(vrt).getroot()  # noqa: S314  expat bounds the expansion of entities
    except ET.ParseError as error:
        raise SourceError(f"{vrt} is not well-formed XML: {error}") from error


def _references(root: ET.Element, *, vrt: Path) -> Iterator[tuple[ET.Element, Path]]:
    """The elements of a VRT that name files, with the path each means; in any case, as in GDAL."""
    for element in root.iter():
        if element.tag.lower() in ("sourcefilename", "sourcedataset"):
            attributes = {key.lower(): value for key, value in element.attrib.items()}
            name = (element.text or "").strip()
            relative = attributes.get("relativetovrt", "0") == "1"
            yield element, vrt.parent / name if relative else Path(name)


def _check_references(vrt: Path, *, parents: tuple[Path, ...]) -> None:
    """Refuse a VRT that leads anywhere but to local GeoTIFFs and VRTs, or to itself."""
    for element, path in _references(_parse(vrt), vrt=vrt):
        if not path.is_absolute():
            raise SourceError(
                f"{vrt} names {element.text!r} relative to the working directory; set relativeToVRT"
            )
        if not path.is_file():
            raise SourceError(f"{vrt} names {element.text!r}, which is not a local file")
        if path.resolve() in (*parents, vrt.resolve()):
            raise SourceError(f"{vrt} leads back to itself through {element.text!r}")
        if _kind(path) == "VRT":
            _check_references(path, parents=(*parents, vrt.resolve()))


def _sort_bands(dataset: Any, *, path: Path) -> _Bands:
    # GDAL calls the fourth band of any new 8-bit file alpha; a description says what it really is.
    alphas = [
        band
        for band, colour, text in zip(
            dataset.indexes, dataset.colorinterp, dataset.descriptions, strict=True
        )
        if colour == ColorInterp.alpha and (text or "alpha").lower() == "alpha"
    ]
    channels = tuple(band for band in dataset.indexes if band not in alphas)
    if not channels or len(alphas) > 1:
        raise SourceError(
            f"{path} has {len(channels)} channels and {len(alphas)} alpha bands;"
            " at least one channel and at most one alpha band are needed"
        )
    masked: list[int] = []
    shared = False
    for band in channels:
        flags = dataset.mask_flag_enums[band - 1]
        known = flags == [MaskFlags.nodata] and dataset.nodatavals[band - 1] is not None
        if known or MaskFlags.all_valid in flags or MaskFlags.alpha in flags:
            continue  # nodata and alpha are applied here, all other masks by GDAL
        if MaskFlags.per_dataset not in flags or not shared:
            masked.append(band)
        shared = shared or MaskFlags.per_dataset in flags
    return _Bands(channels=channels, alpha=next(iter(alphas), None), masked=tuple(masked))


def _stored_validity(dataset: Any, bands: _Bands, *, window: Window) -> NDArray[np.bool_]:
    """(*S) bool, True where no mask of the file and no alpha band hides the pixel; a new array."""
    valid_S = np.ones((window.height, window.width), dtype=np.bool_)
    for band in bands.masked:
        valid_S &= dataset.read_masks(band, window=window) != 0
    if bands.alpha is not None:
        valid_S &= dataset.read(bands.alpha, window=window) != 0
    return valid_S


def _drop_nodata(
    valid_S: NDArray[np.bool_], image_CS: NDArray[Any], *, nodata: tuple[float | None, ...]
) -> None:
    """Clear ``valid_S`` in place where any channel is nodata or not finite."""
    kind = image_CS.dtype
    for image_S, value in zip(image_CS, nodata, strict=True):
        if kind.kind == "f":
            np.logical_and(valid_S, np.isfinite(image_S), out=valid_S)
        if value is not None and kind.type(value) == value:  # 0.5 cannot occur among bytes
            valid_S &= image_S != kind.type(value)


def _describe(dataset: Any, bands: _Bands, *, path: Path) -> ImageInfo:
    affine = tuple(float(value) for value in dataset.transform[:6])
    if not all(map(math.isfinite, affine)) or dataset.transform.determinant == 0:
        raise SourceError(
            f"{path} has the geotransform {affine}, which places no pixels; repair it"
        )
    dtypes = {dataset.dtypes[band - 1] for band in bands.channels}
    if len(dtypes) > 1 or np.dtype(next(iter(dtypes))).kind not in "iuf":
        raise SourceError(f"{path} has bands of {sorted(dtypes)}; one real type for all is needed")
    spacing, unit, fullness = pixel_size(dataset, path=path)
    return ImageInfo(
        shape=dataset.shape,
        axes=("y", "x"),
        channels=_channel_names(dataset, bands),
        dtype=next(iter(dtypes)),
        nodata=tuple(dataset.nodatavals[band - 1] for band in bands.channels),
        spacing=spacing,
        unit=unit,
        fullness=fullness,
        graticule=graticule(dataset),
        crs=dataset.crs.to_wkt(version="WKT2_2019") if dataset.crs else None,
        affine=affine,
        notes=_notes(dataset, bands),
    )


def _other_places(dataset: Any) -> str:
    """What places its pixels beside an affine: ground control points and RPCs; empty for none."""
    points, crs = dataset.gcps
    if not points and dataset.rpcs is None:
        return ""
    found = [(p.row, p.col, p.x, p.y, p.z) for p in points]
    return repr((found, crs.to_wkt() if crs else None, dataset.rpcs))


def _channel_names(dataset: Any, bands: _Bands) -> tuple[str, ...]:
    described = [dataset.descriptions[band - 1] for band in bands.channels]
    if not any(described):
        colours = [dataset.colorinterp[band - 1] for band in bands.channels]
        vague = {ColorInterp.undefined, ColorInterp.gray, ColorInterp.palette}
        described = ["" if colour in vague else colour.name for colour in colours]
    return tuple(
        name or str(number) for number, name in zip(bands.channels, described, strict=True)
    )


def _notes(dataset: Any, bands: _Bands) -> tuple[str, ...]:
    notes = [] if dataset.crs else ["no CRS"]
    if dataset.transform.b or dataset.transform.d:
        notes.append("rotated affine")
    if bands.alpha is not None:
        notes.append(f"band {bands.alpha} is alpha: it says what is valid and is no channel")
    notes += area_notes(dataset)
    stated = {(dataset.scales[band - 1], dataset.offsets[band - 1]) for band in bands.channels}
    if stated != {(1.0, 0.0)}:
        notes.append("the file's scale and offset of bands are not applied: values are as stored")
    if dataset.gcps[0] and not dataset.transform.is_identity:
        notes.append("ground control points beside an affine are left out")
    elif dataset.gcps[0] or dataset.rpcs:
        notes.append("ground control points or RPCs are carried to the mask, and not used")
    if dataset.driver == "GTiff" and dataset.subdatasets:
        notes.append(f"the file holds {len(dataset.subdatasets)} images; the first is used")
    return tuple(notes)


def _content_digest(path: Path, *, known: dict[Path, str]) -> str:
    """SHA-256 of a TIFF and its external mask, or of a VRT with its references by content."""
    if path not in known:
        if _kind(path) == "VRT":
            known[path] = _vrt_digest(path, known=known)
        else:
            parts = [path, Path(f"{path}.msk")]
            known[path] = _combine([_file_digest(part) for part in parts if part.is_file()])
    return known[path]


def _vrt_digest(vrt: Path, *, known: dict[Path, str]) -> str:
    root = _parse(vrt)
    contents = []
    for element, path in _references(root, vrt=vrt):
        element.attrib.clear()
        element.text = _content_digest(path, known=known)
        contents.append(element.text)
    return _combine([hashlib.sha256(ET.tostring(root)).hexdigest(), *contents])


def _combine(digests: list[str]) -> str:
    prefix = _SAMPLED if any(digest.startswith(_SAMPLED) for digest in digests) else ""
    return prefix + hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        state = os.fstat(file.fileno())
        if state.st_size <= _WHOLE_FILE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        sample = hashlib.sha256(f"{state.st_size} {state.st_mtime_ns}".encode())
        sample.update(file.read(_SAMPLE_BYTES))
        file.seek(-_SAMPLE_BYTES, os.SEEK_END)
        sample.update(file.read(_SAMPLE_BYTES))
        return _SAMPLED + sample.hexdigest()


def _line(error: BaseException) -> str:
    """The cause in one line; GDAL's own words hang on the binding's exception."""
    cause = error.__cause__ or error
    return " ".join(str(cause).split())
