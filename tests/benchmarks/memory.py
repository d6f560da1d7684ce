"""``make bench-memory``: does peak memory grow with the scene? 4096 px against 16384 px a side."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import rasterio
from benchmarks.process_memory import Measured, measure
from rasterio.transform import from_origin
from scenes import fresh, texture

SIDES = (4096, 16384)
BLOCK = 1024


def write_wallpaper(path: Path, side: int) -> None:
    """Four bands of one block of texture, repeated: cheap to write at any size."""
    block = np.stack([texture((BLOCK, BLOCK), seed=seed) for seed in range(4)])
    with rasterio.open(
        path, "w", driver="GTiff", width=side, height=side, count=4, dtype="uint16",
        crs="EPSG:32633", transform=from_origin(500000, 5000000, 10, 10), nodata=0, tiled=True,
        blockxsize=512, blockysize=512, compress="deflate", zlevel=1, num_threads=2,
    ) as file:  # fmt: skip
        for y in range(0, side, BLOCK):
            for x in range(0, side, BLOCK):
                file.write(block, window=((y, y + BLOCK), (x, x + BLOCK)))


def run(folder: Path, side: int) -> Measured:
    """Segment a scene of ``side`` px with the defaults, without CRF."""
    scene = folder / f"scene-{side}.tif"
    write_wallpaper(scene, side)
    command = [
        str(Path(sys.executable).with_name("terravox")), "segment", str(scene),
        "-o", str(folder / f"mask-{side}.tif"), "--model", str(folder / "slim"), "--crf", "off",
    ]  # fmt: skip
    return measure(command, env=os.environ | {"HOME": str(folder)})


def main() -> None:
    """Print both peaks and by how much they differ; fail at 15 % or more."""
    with tempfile.TemporaryDirectory(prefix="terravox-bench-") as name:
        folder = Path(name)
        fresh(folder / "slim", bands=4, classes=6)
        peaks = {}
        for side in SIDES:
            measured = run(folder, side)
            peaks[side] = measured.peak_bytes
            plan = json.loads((folder / f"mask-{side}.tif.run" / "plan.json").read_text())
            print(
                f"{side} px: peak {measured.peak_bytes / 2**20:.0f} MiB (PSS, driver and actors;"
                f" the plan said {plan['peak_memory_bytes'] / 2**20:.0f}),"
                f" {measured.seconds:.0f} s, {side * side / 1e6 / measured.seconds:.2f} Mpx/s"
            )
    small, large = (peaks[side] for side in SIDES)
    growth = large / small - 1
    print(f"growth from {SIDES[0]} to {SIDES[1]} px: {growth:+.1%}")
    sys.exit(growth >= 0.15)


if __name__ == "__main__":
    main()
