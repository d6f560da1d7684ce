"""``make bench-gpu-segment``: a deep network over a large scene on a GPU, from file to mask.

How fast, for what share of the tiles' time the GPU had work, as NVIDIA's own tool saw it, and
which share of the arithmetic that it can do was done. ``ARGS='--device cpu --network resnet18
--side 2048'`` tries the program where there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks.memory import BLOCK, write_wallpaper
from scenes import fresh

SAMPLES_MS = 100
"""Between two looks at the GPU."""

FACTORS = {"cuda": 8192, "cpu": 2048}
"""Side of the matrices whose product is timed."""

MATMUL_S = 2.0
"""For which products are computed."""


def matmul_rate(device: str) -> float:
    """Floating point operations a second of products of square matrices, bfloat16."""
    side = FACTORS[device]
    one, other = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    for _ in range(3):  # kernels are chosen, clocks rise
        product = one @ other
    float(product[0, 0])  # waits until all that was asked for is done
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < MATMUL_S:
        for _ in range(10):
            product = one @ other
        float(product[0, 0])
        count += 10
    return 2 * side**3 * count / (time.perf_counter() - start)


@contextmanager
def watched(log: Path, *, device: str) -> Iterator[None]:
    """Have the share of time in which the GPU ran anything written to a file, line by line."""
    if device == "cpu":
        yield
        return
    command = [
        "nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits",
        "-lms", str(SAMPLES_MS),
    ]  # fmt: skip
    with log.open("w") as file, subprocess.Popen(command, stdout=file) as tool:
        try:
            yield
        finally:
            tool.terminate()


def busy_share(log: Path) -> float:
    """Of the time between the first and the last kernel, by the tool's samples; NaN for none."""
    seen = [float(line) for line in log.read_text().split()] if log.exists() else []
    busy = [number for number, share in enumerate(seen) if share]
    if not busy:
        return float("nan")
    between = seen[busy[0] : busy[-1] + 1]
    return sum(between) / len(between) / 100


def segment(scene: Path, mask: Path, bundle: Path, *options: str) -> float:
    """Run the command in a process of its own; seconds. Raises CalledProcessError."""
    program = "import sys; from workflows.cli import main; sys.exit(main())"
    command = [
        sys.executable, "-c", program, "segment", str(scene), "-o", str(mask),
        "--model", str(bundle), "--crf", "off", "--precision", "bf16", *options,
    ]  # fmt: skip
    start = time.monotonic()
    subprocess.run(command, check=True, env=os.environ | {"HOME": str(scene.parent)})
    return time.monotonic() - start


def read_json(mask: Path, name: str) -> dict[str, Any]:
    """A paper of the run that made a mask."""
    document: dict[str, Any] = json.loads(Path(f"{mask}.run", name).read_text())
    return document


def main() -> None:
    """Print what the run reached, and of what."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=tuple(FACTORS), default="cuda")
    parser.add_argument("--network", default="resnet101", help="resnet18, resnet50 or resnet101")
    parser.add_argument("--side", type=int, default=16384, help="of the scene, in px")
    parser.add_argument("--backend", choices=("ray", "serial"), default="ray")
    asked = parser.parse_args()
    if asked.side % BLOCK:
        parser.error(f"--side {asked.side}: must be a multiple of {BLOCK} px")
    can = matmul_rate(asked.device)
    if asked.device == "cuda":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(prefix="terravox-bench-") as name:
        folder = Path(name)
        scene, mask, bundle, log = (folder / n for n in ("scene.tif", "mask.tif", "b", "busy"))
        fresh(bundle, backbone=asked.network, bands=4, classes=6)
        write_wallpaper(scene, asked.side)
        with watched(log, device=asked.device):
            options = ("--device", asked.device, "--backend", asked.backend)
            seconds = segment(scene, mask, bundle, *options)
        card = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU"
        print(f"{asked.network}, {asked.side} x {asked.side} px, bf16, {card}")
        report(
            mask, megapixels=asked.side**2 / 1e6, seconds=seconds, share=busy_share(log), can=can
        )


def report(mask: Path, *, megapixels: float, seconds: float, share: float, can: float) -> None:
    """Print what was reached; ``share`` of the time busy, ``can`` operations a second at most."""
    plan, manifest = read_json(mask, "plan.json"), read_json(mask, "manifest.json")
    compute = manifest["stages"]["compute"]
    busy, done = compute["busy_s"], 2 * plan["multiply_adds"] / compute["busy_s"]
    print(
        f"{plan['tiles']} tiles of {plan['tile'][0]} px, windows of"
        f" {plan['windows']['features']} features, halo work {plan['halo_work_ratio']:.3f}\n"
        f"whole command {seconds:.1f} s, {megapixels / seconds:.2f} Mpx/s; tiles {busy:.1f} s on"
        f" the device, {megapixels / busy:.2f} Mpx/s\n"
        f"device busy {share:.1%} of the time between its first and last kernel (nvidia-smi),"
        f" {compute['busy_share']:.1%} by the run's own count; 90 % aimed at\n"
        f"{done / 1e12:.2f} TFLOP/s, of {can / 1e12:.2f} of products of matrices in bf16:"
        f" {done / can:.1%}; 35 % aimed at"
    )


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"a measured command failed: {error}")
