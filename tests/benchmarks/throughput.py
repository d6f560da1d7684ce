"""``make bench-throughput``: the whole command beside one pass of torch and beside MONAI's windows.

All have the same network, whose image pooling (ResNet only) is the mean over 512 px: of the crop
around each place in the pass and in terravox, of the window in MONAI. Every run is a process of
its own, from the scene's file to the mask's; CRF off. Ratios are of one call of this program.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import rasterio
from benchmarks.memory import BLOCK, write_wallpaper
from benchmarks.process_memory import Measured, measure
from scenes import fresh

PASS = "one pass of torch, fp32"
"""The run that speed and labels are compared with."""


def runs_of(scene: Path, bundle: Path, folder: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """Label, output and command of each run."""

    def module(name: str, output: Path, *arguments: str) -> list[str]:
        line = [sys.executable, "-m", f"benchmarks.{name}", str(scene), str(bundle), str(output)]
        return [*line, *arguments]

    def terravox(output: Path, *options: str) -> list[str]:
        script = str(Path(sys.executable).with_name("terravox"))
        line = [script, "segment", str(scene), "-o", str(output), "--model", str(bundle)]
        return [*line, "--crf", "off", *options]

    outputs = (folder / f"mask{number}.tif" for number in range(6))
    output = next(outputs)
    yield PASS, output, module("whole_pass", output)
    output = next(outputs)
    yield "terravox, fp32", output, terravox(output, "--precision", "fp32")
    for overlap in ("0.25", "0.5"):
        output = next(outputs)
        command = module("monai_windows", output, overlap, "gaussian", "channels_last")
        yield f"MONAI, gaussian, overlap {overlap}, fp32", output, command
    output = next(outputs)
    yield "terravox, its defaults", output, terravox(output)
    output = next(outputs)
    command = module("monai_windows", output, "0.25", "constant", "contiguous_format")
    yield "MONAI, its defaults (roi 512)", output, command


def share_that_differs(one: Path, other: Path) -> float:
    """Share of pixels whose labels differ between two masks."""
    with rasterio.open(one) as first, rasterio.open(other) as second:
        windows = [window for _, window in first.block_windows()]
        differ = sum(
            int((first.read(1, window=window) != second.read(1, window=window)).sum())
            for window in windows
        )
        return differ / (first.width * first.height)


def main() -> None:
    """Print seconds, peak memory and ratios of every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="slim", help="slim, resnet18, resnet50 or resnet101")
    parser.add_argument("--side", type=int, default=4096, help="of the scene, in px")
    asked = parser.parse_args()
    if asked.side % BLOCK:
        parser.error(f"--side {asked.side}: must be a multiple of {BLOCK} px")
    with tempfile.TemporaryDirectory(prefix="terravox-bench-") as name:
        folder = Path(name)
        scene, bundle = folder / "scene.tif", folder / asked.network
        fresh(bundle, backbone=asked.network, bands=4, classes=6)
        write_wallpaper(scene, asked.side)
        env = os.environ | {"HOME": name}
        base: Measured | None = None
        print(f"{asked.network}, {asked.side} x {asked.side} px, {os.cpu_count()} cores")
        for label, output, command in runs_of(scene, bundle, folder):
            each = measure(command, env=env)
            base = base or each
            differ = share_that_differs(folder / "mask0.tif", output)
            print(
                f"{label:38} {each.seconds:7.1f} s {asked.side**2 / 1e6 / each.seconds:6.2f} Mpx/s"
                f" {each.peak_bytes / 2**20:7.0f} MiB"
                f"  speed x{base.seconds / each.seconds:.2f}"
                f"  memory x{each.peak_bytes / base.peak_bytes:.2f}"
                f"  other labels {differ:.2e}",
                flush=True,
            )


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"a measured command failed: {error}")
