"""Write the demo scene: a GeoTIFF of four bands at 10 m, and the truth on the same grid."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.transform import from_origin
from rasterio.windows import Window

from pipeline.domain import Region
from pipeline.errors import SourceError
from workflows.demo.landscape import BANDS, CLASSES, IGNORED, NODATA, render

BLOCK = 512
"""Side of a tile of the file, and of what is computed at once, in pixels."""

PIXEL_SIZE_M = 10.0

TRAINING_SEED = 11
VALIDATION_SEED = 23
DEMO_SEED = 42
"""The seed of the scene that the demo segments; neither trained nor tuned on."""


def write_scene(
    path: Path,
    truth: Path,
    *,
    size: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write ``size`` x ``size`` pixels of the landscape of ``seed``, block by block.

    Memory does not grow with ``size``; a larger scene of one seed contains the smaller one.

    Args:
        path: The image: uint16 reflectance x 10000, nodata 0, tiled, deflate.
        truth: Class ids as uint8, nodata 255.
        size: Side, in pixels.
        seed: Which landscape.
        progress: Told (blocks done, blocks in all).

    Raises:
        SourceError: Where ``size`` is below one pixel.
    """
    if size < 1:
        raise SourceError(f"a scene of {size} px was asked for: the side must be at least 1 px")
    blocks = list(Region.whole((size, size)).blocks((BLOCK, BLOCK)))
    common = _profile(size)
    with (
        rasterio.open(
            path, "w", **common, count=len(BANDS), dtype="uint16", nodata=NODATA
        ) as image,
        rasterio.open(truth, "w", **common, count=1, dtype="uint8", nodata=IGNORED) as labels,
        ThreadPoolExecutor(max_workers=2) as pool,
    ):
        image.descriptions = BANDS
        labels.descriptions = ("class",)
        labels.update_tags(CLASSES=", ".join(f"{i} {name}" for i, name in enumerate(CLASSES)))
        # By eight, so that what is rendered never runs far ahead of what is written.
        for first in range(0, len(blocks), 8):
            group = blocks[first : first + 8]
            rendered = pool.map(lambda block: render(block, seed=seed), group)
            for done, (region, (image_CS, label_S)) in enumerate(
                zip(group, rendered, strict=True), first + 1
            ):
                _write(image, image_CS, region)
                _write(labels, label_S[None], region)
                if progress is not None:
                    progress(done, len(blocks))


def _profile(size: int) -> dict[str, Any]:
    """What both files share: grid and storage."""
    return {
        "driver": "GTiff",
        "height": size,
        "width": size,
        "crs": "EPSG:32633",
        "transform": from_origin(399960.0, 5400000.0, PIXEL_SIZE_M, PIXEL_SIZE_M),
        "tiled": True,
        "blockxsize": BLOCK,
        "blockysize": BLOCK,
        "compress": "deflate",
        "zlevel": 1,
        "num_threads": 2,
        "bigtiff": "if_safer",
    }


def _write(file: rasterio.io.DatasetWriter, array_CS: NDArray[np.generic], region: Region) -> None:
    (y, x), (height, width) = region.start, region.shape
    file.write(array_CS, window=Window(x, y, width, height))
