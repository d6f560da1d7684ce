"""``make bench-memory``: does peak memory grow with the scene? 8192 px against 32768 px a side."""

from __future__ import annotations

import argparse
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

from pipeline.domain import Region

BLOCK = 1024
CUT = 4
"""A side of the larger scene over one of the smaller."""

TILE = 1024
"""In px, in both: left to the plan, a larger scene may get a larger tile."""


def write_wallpaper(path: Path, side: int, *, valid: Region | None = None) -> None:
    """Four bands of one block of texture, repeated: cheap to write at any size.

    Args:
        path: the GeoTIFF.
        side: of the scene, in px; a multiple of ``BLOCK``.
        valid: where the blocks are; all else is nodata and takes no room. All of it where None.
    """
    block = np.stack([texture((BLOCK, BLOCK), seed=seed) for seed in range(4)])
    with rasterio.open(
        path, "w", driver="GTiff", width=side, height=side, count=4, dtype="uint16",
        crs="EPSG:32633", transform=from_origin(500000, 5000000, 10, 10), nodata=0, tiled=True,
        blockxsize=512, blockysize=512, compress="deflate", zlevel=1, num_threads=2,
        bigtiff="if_safer", sparse_ok=True,
    ) as file:  # fmt: skip
        for part in (valid or Region.whole((side, side))).blocks((BLOCK, BLOCK)):
            window = tuple(zip(part.start, part.stop, strict=True))
            file.write(block, window=window)


def run(folder: Path, side: int) -> Measured:
    """Segment a scene of ``side`` px in tiles of ``TILE``, without CRF."""
    scene = folder / f"scene-{side}.tif"
    write_wallpaper(scene, side)
    command = [
        str(Path(sys.executable).with_name("terravox")), "segment", str(scene),
        "-o", str(folder / f"mask-{side}.tif"), "--model", str(folder / "slim"), "--crf", "off",
        "--tile", str(TILE),
    ]  # fmt: skip
    measured = measure(command, env=os.environ | {"HOME": str(folder)})
    scene.unlink()
    return measured


def predicted(mask: Path) -> int:
    """Peak bytes that the plan of a run stated."""
    plan = json.loads(Path(f"{mask}.run", "plan.json").read_text())
    return int(plan["peak_memory_bytes"])


def main() -> None:
    """Print both peaks and by how much they differ; fail at 15 % or more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=32768, help="of the larger scene, in px")
    asked = parser.parse_args()
    if asked.side % (CUT * BLOCK):
        parser.error(f"--side {asked.side}: must be a multiple of {CUT * BLOCK} px")
    sides = (asked.side // CUT, asked.side)
    with tempfile.TemporaryDirectory(prefix="terravox-bench-") as name:
        folder = Path(name)
        fresh(folder / "slim", bands=4, classes=6)
        peaks = {}
        for side in sides:
            measured = run(folder, side)
            peaks[side] = measured.peak_bytes
            print(
                f"{side} px: peak {measured.peak_bytes / 2**20:.0f} MiB (PSS of all processes;"
                f" the plan said {predicted(folder / f'mask-{side}.tif') / 2**20:.0f}),"
                f" {measured.seconds:.0f} s, {side * side / 1e6 / measured.seconds:.2f} Mpx/s",
                flush=True,
            )
    small, large = (peaks[side] for side in sides)
    growth = large / small - 1
    print(f"growth from {sides[0]} to {sides[1]} px: {growth:+.1%}")
    sys.exit(growth >= 0.15)


if __name__ == "__main__":
    main()
