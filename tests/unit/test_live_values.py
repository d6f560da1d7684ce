"""What a plain forward of a network holds, by count and in a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from scenes import fresh

MEASURE = """
import sys
from pathlib import Path
import numpy as np
from pipeline.domain import ImageInfo, Region, Tile, TileKey
from pipeline.execution.worker import TileWorker
from pipeline.inference.precision import Precision
from pipeline.inference.reference import ReferenceNetwork
from pipeline.models.bundle import load_bundle
from pipeline.models.frame import Frame
from workflows.sizing import Sizer
from workflows.tracing import traced

TileWorker()  # its heaps
bundle = load_bundle(Path(sys.argv[1]))
dims, side = bundle.architecture.dims, int(sys.argv[3])
precision = Precision(name=sys.argv[2], channels_last=True, why="")
known, scene = traced(bundle, "window"), (side,) * dims
info = ImageInfo(
    shape=scene, axes=("z", "y", "x")[-dims:], channels=("1", "2", "3"), dtype="uint16",
    nodata=(0, 0, 0), spacing=(1.0,) * dims, unit="mm",
)
sizer = Sizer(
    bundle=bundle, info=info, traced=known, reach=known.reach, whole=known.reach, crf=None,
    density=None, canonical_px=None, window=64, hosted=False, scores=False, area=None,
    driver_bytes=0,
)
read = Region.whole(scene)
tile = Tile(key=TileKey("", "certify", 0), core=read, scored=read, read=read)
cost = sizer._model(sizer.sweep(scene, case=""), precision).of_sample(tile)
network = ReferenceNetwork(
    bundle, device="cpu", precision=precision, average=known.average, threads=1
)

def held(key):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

for shape in ((64,) * dims, read.shape):  # the first pays for what is made once
    image_CS = np.ones((3, *shape), np.float32)
    before = held("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    network.logits(image_CS, Frame((0,) * dims, shape), mean=None)
print((held("VmHWM") - before) / cost.device_bytes)
"""


@pytest.mark.parametrize(
    ("backbone", "dims", "precision", "side"),
    [
        ("slim", 2, "bf16", 768),
        ("resnet50", 2, "fp32", 384),
        ("slim", 3, "fp32", 96),
    ],
)
def test_a_sample_takes_no_more_memory_than_was_predicted(
    tmp_path: Path, backbone: str, dims: int, precision: str, side: int
) -> None:
    """A worker would be killed at the end of its night, or half of its memory never be used.

    Of two processes: what the heaps of one keep is up to chance.
    """
    fresh(tmp_path / "b", backbone=backbone, dims=dims)
    words = [sys.executable, "-c", MEASURE, str(tmp_path / "b"), precision, str(side)]
    runs = [subprocess.run(words, check=True, capture_output=True, text=True) for _ in range(2)]
    shares = [float(run.stdout) for run in runs]
    assert min(shares) <= 1.0, shares
    assert max(shares) > 0.5, shares
