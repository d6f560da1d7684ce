"""Archives that batches are run over, and what is read from their answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scenes import texture, write_raster

from workflows.config import SegmentOptions

OPTIONS = SegmentOptions(backend="serial", tracking_uri="none", precision="fp32", tile=64)


def write_volume(path: Path, shape: tuple[int, int, int], *, seed: int) -> Path:
    """An int16 NIfTI of 1 mm voxels."""
    nib.save(nib.Nifti1Image(texture(shape, seed=seed).astype(np.int16), np.eye(4)), path)
    return path


def write_scene(path: Path, shape: tuple[int, int], *, seed: int) -> Path:
    """A GeoTIFF of three bands."""
    return write_raster(path, np.stack([texture(shape, seed=seed + band) for band in range(3)]))


def write_archive(folder: Path) -> Path:
    """Two scenes, a scan, and what goes wrong with files."""
    (folder / "more").mkdir(parents=True)
    scene = write_scene(folder / "a.tif", (100, 130), seed=1)
    write_scene(folder / "more/b.tif", (70, 64), seed=5)
    write_volume(folder / "c.nii.gz", (30, 31, 32), seed=2)
    (folder / "cut.tif").write_bytes(scene.read_bytes()[:20_000])
    (folder / "empty.nii").write_bytes(b"")
    write_raster(folder / "gray.tif", texture((40, 40), seed=1)[np.newaxis])
    return folder


def states(result: dict[str, Any]) -> dict[str, str]:
    """State of each case."""
    return {row["id"]: row["status"] for row in result["cases"]}


def computed(result: dict[str, Any]) -> set[str]:
    """Cases that this run computed."""
    return {row["id"] for row in result["cases"] if row["computed"]}
