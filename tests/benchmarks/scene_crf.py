"""``make bench-scene-crf``: one lattice under 1, 4, 16 and 64 tiles, beside a lattice for each."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import rasterio
import yaml
from benchmarks.process_memory import measure
from numpy.typing import NDArray
from scenes import texture, write_raster

BANDS = ["1", "2", "3"]
CRF = {
    "iterations": 10,
    "smoothness": {"weight": 3, "position": 3},
    "appearance": {
        "weight": 4, "position": 80, "value": 13, "bands": BANDS, "range": [0, 2000],
    },
}  # fmt: skip
HALO = 128
CUTS = (1, 2, 4, 8)
"""Tiles along a side."""


def write_scene(folder: Path, *, side: int, classes: int) -> None:
    """Texture of three bands, and scores that lean to its brightness."""
    image_CYX = np.stack([texture((side, side), seed=seed) for seed in range(len(BANDS))])
    write_raster(folder / "image.tif", image_CYX)
    levels = np.quantile(image_CYX[0], np.linspace(0, 1, classes + 1)[1:-1])
    truth_YX = np.digitize(image_CYX[0], levels).astype(np.int16)
    rng = np.random.default_rng(0)
    odds_KYX = rng.standard_normal((classes, side, side), np.float32)
    for label, odds_YX in enumerate(odds_KYX):
        odds_YX[:] = np.exp(1.5 * odds_YX + np.float32(1.5) * (truth_YX == label))
    odds_KYX /= odds_KYX.sum(axis=0)
    write_raster(folder / "scores.tif", odds_KYX, nodata=None)


def labels(path: Path) -> NDArray[np.uint8]:
    """The mask."""
    with rasterio.open(path) as file:
        found: NDArray[np.uint8] = file.read(1)
    return found


def run(folder: Path, *, scope: str, tile: int) -> tuple[str, Path]:
    """A row of the table but for its last column, and the mask."""
    own = {"scope": "scene"} if scope == "scene" else {"halo": HALO}
    crf, mask = folder / f"{scope}.yaml", folder / f"{scope}-{tile}.tif"
    crf.write_text(yaml.safe_dump(CRF | own))
    command = [
        str(Path(sys.executable).with_name("terravox")), "refine", str(folder / "image.tif"),
        "--scores", str(folder / "scores.tif"), "-o", str(mask), "--crf", str(crf),
        "--tile", str(tile), "--tracking-uri", "none",
    ]  # fmt: skip
    measured = measure(command, env=os.environ | {"HOME": str(folder)})
    plan = json.loads(Path(f"{mask}.run", "plan.json").read_text())
    row = (
        f"{scope:7}{plan['tiles']:>6}{measured.seconds:>10.1f}"
        f"{measured.peak_bytes / 2**20:>10.0f}{plan['peak_memory_bytes'] / 2**20:>10.0f}"
    )
    return row, mask


def main() -> None:
    """Print a row a run; fail where a label differs from that of one tile under one lattice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=1024, help="of the scene, in px")
    parser.add_argument("--classes", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="terravox-bench-") as name:
        folder = Path(name)
        write_scene(folder, side=asked.side, classes=asked.classes)
        print(f"{asked.side} px a side, {asked.classes} classes, halo of a tile's own: {HALO} px")
        print(f"{'scope':7}{'tiles':>6}{'seconds':>10}{'MiB':>10}{'planned':>10}{'differ':>10}")
        single_YX, seen = None, []
        for scope in ("scene", "tile"):
            for cut in CUTS:
                row, mask = run(folder, scope=scope, tile=-(-asked.side // cut))
                found_YX = labels(mask)
                single_YX = found_YX if single_YX is None else single_YX
                differ = int((found_YX != single_YX).sum())
                seen += [differ] if scope == "scene" else []
                print(f"{row}{differ:>10}", flush=True)
    if any(seen):
        sys.exit("a label depends on the tiling")


if __name__ == "__main__":
    main()
