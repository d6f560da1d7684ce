"""``make bench-aoi``: three fields scattered over a scene, beside the whole scene."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import rasterio
import shapely
from benchmarks.memory import BLOCK, CUT, TILE, predicted, write_wallpaper
from benchmarks.process_memory import Measured, measure
from polygons import placed, write_vector
from scenes import fresh

FIELD = 600
"""Radius of a field, in px."""

PLACES = ((0.11, 0.17), (0.52, 0.49), (0.93, 0.71))
"""Of the fields' middles, in sides of the scene, columns first."""


def run(folder: Path, name: str, side: int, *more: str) -> Measured:
    """Segment the scene of ``side`` px, without CRF; prints what it took."""
    output = folder / f"{name}-{side}.tif"
    command = [
        str(Path(sys.executable).with_name("terravox")), "segment", str(folder / f"{side}.tif"),
        "-o", str(output), "--model", str(folder / "slim"), "--crf", "off", "--tile", str(TILE),
        *more,
    ]  # fmt: skip
    measured = measure(command, env=os.environ | {"HOME": str(folder)})
    tiles = json.loads(Path(f"{output}.run", "manifest.json").read_text())["tiles"]
    print(
        f"{side} px, {name}: {tiles['total'] - tiles['skipped']} of {tiles['total']} tiles,"
        f" {measured.seconds:.1f} s, peak {measured.peak_bytes / 2**20:.0f} MiB (PSS of all"
        f" processes; the plan said {predicted(output) / 2**20:.0f})",
        flush=True,
    )
    return measured


def unlike(whole: Path, part: Path) -> int:
    """Pixels of ``part`` that have a label, and another one than in ``whole``."""
    count = 0
    with rasterio.open(whole) as one, rasterio.open(part) as other:
        for _, window in other.block_windows(1):
            labels_YX = other.read(1, window=window)
            if (labels_YX != other.nodata).any():
                differ_YX = labels_YX != one.read(1, window=window)
                count += int(np.count_nonzero(differ_YX & (labels_YX != other.nodata)))
    return count


def main() -> None:
    """Print all runs; fail where a field differs from the whole scene, or memory grows by 15 %."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=32768, help="of the larger scene, in px")
    asked = parser.parse_args()
    if asked.side % (CUT * BLOCK):
        parser.error(f"--side {asked.side}: must be a multiple of {CUT * BLOCK} px")
    small, large = asked.side // CUT, asked.side
    with tempfile.TemporaryDirectory(prefix="terravox-bench-") as name:
        folder = Path(name)
        fresh(folder / "slim", bands=4, classes=6)
        peaks = []
        for side in (small, large):
            fields = [shapely.Point(side * x, side * y).buffer(FIELD) for x, y in PLACES]
            vector = folder / f"{side}.geojson"
            write_vector(vector, *(placed(f, crs="EPSG:4326") for f in fields), crs="EPSG:4326")
            write_wallpaper(folder / f"{side}.tif", side)
            if side == small:
                run(folder, "whole", side)
            peaks.append(run(folder, "fields", side, "--aoi", str(vector)).peak_bytes)
        differ = unlike(folder / f"whole-{small}.tif", folder / f"fields-{small}.tif")
    growth = peaks[1] / peaks[0] - 1
    print(f"labels in fields unlike the whole scene's: {differ}")
    print(f"growth of memory from {small} to {large} px: {growth:+.1%}")
    sys.exit(differ > 0 or growth >= 0.15)


if __name__ == "__main__":
    main()
