"""What the tests on real files share: a network to fill or train, and how a mask is looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
import torch
from rio_cogeo.cogeo import cog_validate

from pipeline.models.bundle import Architecture
from pipeline.models.deeplab import DeepLab, build_network
from workflows.config import SegmentOptions

NODATA = 255
SERIAL = SegmentOptions(
    backend="serial", tracking_uri="none", precision="fp32", crf="off", any_resolution=True
)


def slim_network(dims: int, *, bands: int, classes: int, seed: int) -> DeepLab:
    """A slim network with fresh weights, and the halo of the demo's."""
    stride = {2: 4, 3: 2}[dims]
    architecture = Architecture(
        family="v3",
        backbone="slim",
        dims=dims,
        output_stride=stride,
        rates=(2, 4, 6),
        image_pooling=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_network(architecture, bands=bands, classes=classes)


def assert_same_grid(mask_path: Path, source_path: Path) -> None:
    """CRS, affine and size, exactly; and a cloud-optimised layout."""
    with rasterio.open(source_path) as source, rasterio.open(mask_path) as mask:
        assert mask.crs == source.crs
        assert mask.transform == source.transform
        assert mask.shape == source.shape
        assert (mask.count, mask.dtypes, mask.nodata) == (1, ("uint8",), NODATA)
    valid, errors, warnings = cog_validate(mask_path, quiet=True)
    assert (valid, errors, warnings) == (True, [], [])


def labels_of(path: Path) -> np.ndarray:
    with rasterio.open(path) as mask:
        labels_YX: np.ndarray = mask.read(1)
    return labels_YX
