"""Small pictures of a scene or scan and of its mask, from sampled windows of any size of input.

Axes in array names: C colour band (red, green, blue), A those and alpha; S space, Y X picture.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.domain import ImageInfo, Region, Shape
from pipeline.errors import SourceReadError
from pipeline.ports import Area, ArrayStore, Source

log = logging.getLogger(__name__)

WINDOW = 512
"""Side of what is read at once, in pixels: the block of most tiled files."""

MAX_WINDOWS = 4096
"""Beyond this many windows (about a gigapixel) the picture samples every n-th window only."""

STRETCH_PERCENT = (2.0, 98.0)
OVERLAY_OPACITY = 0.45
PLANE_GAP_PX = 6

Positions = NDArray[np.intp]
"""Increasing pixel numbers along one axis of the scene, one per pixel of the picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """The picture's pixels before they are coloured."""

    image_CS: NDArray[Any]
    """(3, *S), the source's values; zero where not valid."""

    valid_S: NDArray[np.bool_]
    labels_S: NDArray[Any]
    """(*S); the nodata value outside the scene."""


def quicklook(
    source: Source,
    mask: ArrayStore,
    *,
    colors: Mapping[int, str],
    nodata: int,
    area: Area | None = None,
    max_side: int = 768,
) -> dict[str, Image.Image]:
    """Pictures ``image``, ``mask`` and ``overlay``, RGBA, transparent where there is nothing.

    A raster is shown in its red, green and blue bands, or its first three, or in grey. A volume
    is shown as its middle axial, coronal and sagittal planes, side by side, the patient's left on
    the left and front (or head) up; the sagittal plane faces right.
    What cannot be read of the source is transparent in ``image``.

    Args:
        source: the scene or scan.
        mask: its labels, of the same shape.
        colors: ``#rrggbb`` of each label; black is background and is not laid over the image.
        nodata: the label of pixels that are not known.
        area: where a raster has labels: only what lies near is shown and read; None for all of it.
        max_side: the longer side of the pictures, in pixels; a raster is never enlarged.

    Raises:
        StoreError: the mask could not be read.
    """
    info = source.info
    if info.ndim == 2:
        shown = Region.whole(info.shape)
        if area is not None:
            shown = area.bounds.align(WINDOW).clip(info.shape)
        step = max(1.0, max(shown.shape) / max_side)
        sizes = tuple(max(1, round(length / step)) for length in shown.shape)
        places = zip(_positions(shown.shape, sizes), shown.start, strict=True)
        positions = tuple(axis + start for axis, start in places)
        sample = _sampled(source, mask, positions=positions, nodata=nodata, area=area)
    else:
        planes = [
            _upright(_sampled(source, mask, positions=positions, nodata=nodata), across=across)
            for across, positions in enumerate(_planes(info, max_side))
        ]
        sample = _side_by_side(planes, nodata=nodata)
    return _pictures(sample, colors=colors, nodata=nodata)


def _bands(info: ImageInfo) -> tuple[int, int, int]:
    names = [name.lower() for name in info.channels]
    if {"red", "green", "blue"} <= set(names):
        return names.index("red"), names.index("green"), names.index("blue")
    return (0, 1, 2) if len(names) >= 3 else (0, 0, 0)


def _positions(shape: Shape, sizes: Shape) -> tuple[Positions, ...]:
    """Pixel centres of a picture of ``sizes`` over a scene of ``shape``.

    Where the windows are too many, positions move into those that are read: every n-th one.
    """
    counts = [-(-length // WINDOW) for length in shape]
    skip = max(1, math.ceil(math.sqrt(math.prod(counts) / MAX_WINDOWS)))
    moved = []
    for length, size in zip(shape, sizes, strict=True):
        centres = ((np.arange(size) + 0.5) * length / size).astype(np.intp)
        window = centres // (WINDOW * skip) * (WINDOW * skip)
        moved.append(np.minimum(centres, window + WINDOW - 1))
    return tuple(moved)


def _planes(info: ImageInfo, max_side: int) -> Iterator[tuple[Positions, ...]]:
    """Positions of the middle axial, coronal and sagittal planes, all at one scale."""
    z, y, x = (length * spacing for length, spacing in zip(info.shape, info.spacing, strict=True))
    scale = (max_side - 2 * PLANE_GAP_PX) / max(x + x + y, z, y)
    sizes = tuple(max(1, round(extent * scale)) for extent in (z, y, x))
    for across in range(3):
        positions = list(_positions(info.shape, sizes))
        positions[across] = np.array([info.shape[across] // 2])
        yield tuple(positions)


def _sampled(
    source: Source,
    mask: ArrayStore,
    *,
    positions: tuple[Positions, ...],
    nodata: int,
    area: Area | None = None,
) -> _Sample:
    """Read window by window what lies at ``positions``, where it touches the area."""
    shape, bands = tuple(len(axis) for axis in positions), _bands(source.info)
    image_CS = np.zeros((3, *shape), source.info.dtype)
    valid_S, labels_S = np.zeros(shape, bool), np.full(shape, nodata, np.uint16)
    for part in itertools.product(*(_windows(axis) for axis in positions)):
        here = [axis[span] for axis, span in zip(positions, part, strict=True)]
        region = Region(
            tuple(int(axis[0]) for axis in here), tuple(int(axis[-1]) + 1 for axis in here)
        )
        if area is not None and not area.touches(region):
            continue
        picked = np.ix_(*(axis - axis[0] for axis in here))
        labels_S[part] = mask.read(region)[picked]
        try:
            block = source.read(region)
        except SourceReadError as error:  # its tiles have failed by name; here it stays transparent
            log.info("%s", error)
            continue
        for band, channel in enumerate(bands):
            image_CS[band][part] = block.image_CS[channel][picked]
        valid_S[part] = block.valid_S[picked]
    return _Sample(image_CS=np.where(valid_S, image_CS, 0), valid_S=valid_S, labels_S=labels_S)


def _windows(positions: Positions) -> list[slice]:
    """Runs of positions that lie in one window."""
    starts = [0, *(np.flatnonzero(np.diff(positions // WINDOW)) + 1).tolist(), len(positions)]
    return [slice(a, b) for a, b in itertools.pairwise(starts)]


def _upright(sample: _Sample, *, across: int) -> _Sample:
    """The plane at right angles to axis ``across`` as (Y, X), front or head up."""
    return _Sample(
        image_CS=np.flip(sample.image_CS.take(0, axis=across + 1), axis=1),
        valid_S=np.flip(sample.valid_S.take(0, axis=across), axis=0),
        labels_S=np.flip(sample.labels_S.take(0, axis=across), axis=0),
    )


def _side_by_side(planes: list[_Sample], *, nodata: int) -> _Sample:
    """All planes in one row, centred in height, with nothing between them."""
    shapes = [plane.valid_S.shape for plane in planes]
    height = max(rows for rows, _ in shapes)
    width = sum(columns for _, columns in shapes) + PLANE_GAP_PX * (len(planes) - 1)
    row = _Sample(
        image_CS=np.zeros((3, height, width), planes[0].image_CS.dtype),
        valid_S=np.zeros((height, width), bool),
        labels_S=np.full((height, width), nodata, np.uint16),
    )
    left = 0
    for plane, (rows, columns) in zip(planes, shapes, strict=True):
        top = (height - rows) // 2
        place = (slice(top, top + rows), slice(left, left + columns))
        row.image_CS[(slice(None), *place)] = plane.image_CS
        row.valid_S[place] = plane.valid_S
        row.labels_S[place] = plane.labels_S
        left += columns + PLANE_GAP_PX
    return row


def _pictures(sample: _Sample, *, colors: Mapping[int, str], nodata: int) -> dict[str, Image.Image]:
    image_YXC, mask_YXA = _stretched(sample), painted(sample.labels_S, colors, nodata=nodata)
    shown_YX = sample.valid_S
    laid_YX = (mask_YXA[..., 3] > 0) & (mask_YXA[..., :3].max(axis=-1) > 0)
    opacity_YX1 = np.where(laid_YX, OVERLAY_OPACITY, 0.0)[..., np.newaxis]
    overlay_YXC = image_YXC * (1 - opacity_YX1) + mask_YXA[..., :3] * opacity_YX1
    return {
        "image": _rgba(image_YXC, shown_YX),
        "mask": Image.fromarray(mask_YXA, "RGBA"),
        "overlay": _rgba(overlay_YXC, shown_YX),
    }


def _stretched(sample: _Sample) -> NDArray[np.float64]:
    """(Y, X, 3) in 0..255: each band between its percentiles over the valid pixels."""
    out_YXC = np.zeros((*sample.valid_S.shape, 3))
    if not sample.valid_S.any():
        return out_YXC
    for band, values_YX in enumerate(sample.image_CS.astype(np.float64)):
        low, high = np.percentile(values_YX[sample.valid_S], STRETCH_PERCENT)
        scaled_YX = (values_YX - low) / (high - low if high > low else 1.0)
        out_YXC[..., band] = np.clip(scaled_YX, 0.0, 1.0) * 255.0
    return out_YXC


def painted(
    labels_YX: NDArray[Any], colors: Mapping[int, str], *, nodata: int
) -> NDArray[np.uint8]:
    """(Y, X, 4): the label's colour, transparent for nodata and for labels without one."""
    palette = np.zeros((1 << 16, 4), np.uint8)
    for label, color in colors.items():
        palette[label] = (*bytes.fromhex(color.removeprefix("#")), 255)
    palette[nodata] = 0
    painted: NDArray[np.uint8] = palette[labels_YX]
    return painted


def _rgba(image_YXC: NDArray[np.float64], shown_YX: NDArray[np.bool_]) -> Image.Image:
    alpha_YX1 = np.where(shown_YX, 255, 0)[..., np.newaxis]
    rgba_YXA = np.concatenate([np.rint(image_YXC), alpha_YX1], axis=-1)
    return Image.fromarray(rgba_YXA.astype(np.uint8), "RGBA")
