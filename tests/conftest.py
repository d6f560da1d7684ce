"""Scenes, volumes, bundles and one Ray cluster for the whole session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scenes import fresh, texture, write_raster

from workflows.config import ray_address

ROOT = Path(__file__).parents[1]
# Before anything imports Ray, which reads its authentication then: collecting doctests does.
RAY_ADDRESS = ray_address()
DATA = Path(os.environ.get("TERRAVOX_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def data() -> Path:
    """Real images; the test is skipped where there are none."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}: set TERRAVOX_DATA")
    return DATA


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """700 x 900 px, three bands, with a nodata corner and a hole."""
    image = np.stack([texture((700, 900), seed=seed) for seed in (1, 2, 3)])
    image[:, :100, :60] = 0
    image[1, 300:340, 500:520] = 0
    return write_raster(tmp_path_factory.mktemp("scene") / "scene.tif", image)


@pytest.fixture(scope="session")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 x 77 x 61 voxels at 1 mm, stored left to right reversed, gzip."""
    image = texture((90, 77, 61), seed=4).astype(np.int16)
    affine = np.array([[-1, 0, 0, 40], [0, 1, 0, -30], [0, 0, 1, 10], [0, 0, 0, 1]], dtype=float)
    path = tmp_path_factory.mktemp("volume") / "scan.nii.gz"
    nib.save(nib.Nifti1Image(image, affine), path)
    return path


@pytest.fixture(scope="session")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The slim 2-D network, untrained."""
    return fresh(tmp_path_factory.mktemp("bundles") / "slim").path


@pytest.fixture(scope="session")
def slim3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The slim 3-D network, untrained."""
    return fresh(tmp_path_factory.mktemp("bundles") / "slim3d", dims=3, bands=1).path


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray cluster of two logical cores; its token and leftovers live in a HOME of its own."""
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))
    import ray

    ray.init(
        address=RAY_ADDRESS,
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
