"""``make bench``: the whole command beside a plain torch loop over the same scene, in one run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.memory import write_wallpaper
from benchmarks.process_memory import Measured, measure
from scenes import fresh

SIDE = 4096
PLAIN = """
import sys
import rasterio, torch
from pipeline.models.bundle import load_bundle
from pipeline.models.frame import Frame
scene, bundle_path, output = sys.argv[1:]
torch.set_num_threads(2)
bundle = load_bundle(bundle_path)
network = bundle.network().to(memory_format=torch.channels_last)
with rasterio.open(scene) as source:
    image, profile = source.read().astype("float32"), source.profile
scaling = bundle.input.scaling
image = (torch.from_numpy(image) - scaling.mean[0]) / scaling.std[0]
with torch.inference_mode():
    image = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    labels = network(image, Frame((0, 0), image.shape[2:]))[0].argmax(0).to(torch.uint8).numpy()
with rasterio.open(output, "w", **(profile | {"count": 1, "dtype": "uint8", "nodata": 255})) as f:
    f.write(labels, 1)
"""


def main() -> None:
    """Print seconds, peak memory and their ratios; slim network, fp32, two cores."""
    with tempfile.TemporaryDirectory(prefix="terravox-bench-") as name:
        folder = Path(name)
        scene, bundle = folder / "scene.tif", folder / "slim"
        fresh(bundle, bands=4, classes=6)
        write_wallpaper(scene, SIDE)
        env = os.environ | {"HOME": name}
        script = str(Path(sys.executable).with_name("terravox"))
        runs: dict[str, Measured] = {}
        plain = [sys.executable, "-c", PLAIN, str(scene), str(bundle), f"{name}/plain.tif"]
        runs["plain torch, whole scene, fp32"] = measure(plain, env=env)
        for precision in ("fp32", "bf16"):
            command = [
                script, "segment", str(scene), "-o", f"{name}/{precision}.tif",
                "--model", str(bundle), "--crf", "off", "--precision", precision,
            ]  # fmt: skip
            runs[f"terravox segment, {precision}"] = measure(command, env=env)
        base = next(iter(runs.values()))
        for label, each in runs.items():
            print(
                f"{label:32} {each.seconds:6.1f} s  {SIDE * SIDE / 1e6 / each.seconds:5.2f} Mpx/s"
                f"  {each.peak_bytes / 2**20:6.0f} MiB"
                f"  speed x{base.seconds / each.seconds:.2f}"
                f"  memory x{each.peak_bytes / base.peak_bytes:.2f}"
            )


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"a measured command failed: {error}")
