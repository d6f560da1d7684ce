"""``make bench-deep-memory``: what one interior tile of a deep network takes, fp32, on the CPU.

The scene is three tiles square; only the middle one has pixels, so that the whole command runs
and the network is asked once, for a tile with its full halo.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.memory import BLOCK, predicted, write_wallpaper
from benchmarks.process_memory import measure
from scenes import fresh

from pipeline.domain import Region

LIMIT_BYTES = 8 * 10**9
"""Promised of an interior tile of 4096 px of ResNet-50, by all processes together."""


def main() -> None:
    """Print the peak; fail above the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet50", help="resnet18, resnet50 or resnet101")
    parser.add_argument("--side", type=int, default=4096, help="of the tile, in px")
    asked = parser.parse_args()
    side = asked.side
    if side % BLOCK:
        parser.error(f"--side {side}: must be a multiple of {BLOCK} px")
    with tempfile.TemporaryDirectory(prefix="terravox-bench-") as name:
        folder = Path(name)
        scene, mask, bundle = folder / "scene.tif", folder / "mask.tif", folder / "bundle"
        fresh(bundle, backbone=asked.network, bands=4, classes=6)
        write_wallpaper(scene, 3 * side, valid=Region((side,) * 2, (2 * side,) * 2))
        command = [
            str(Path(sys.executable).with_name("terravox")), "segment", str(scene),
            "-o", str(mask), "--model", str(bundle), "--crf", "off",
            "--tile", str(side), "--precision", "fp32", "--workers", "1",
        ]  # fmt: skip
        measured = measure(command, env=os.environ | {"HOME": name})
        print(
            f"{asked.network}, an interior tile of {side} px, fp32:"
            f" peak {measured.peak_bytes / 1e9:.2f} GB (PSS of all processes;"
            f" the plan said {predicted(mask) / 1e9:.2f}), {measured.seconds:.0f} s"
        )
    sys.exit(measured.peak_bytes > LIMIT_BYTES)


if __name__ == "__main__":
    main()
