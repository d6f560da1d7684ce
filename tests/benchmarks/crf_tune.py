"""``make bench-crf-tune``: ``terravox crf tune`` over small crops, by one engine after another."""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml
from benchmarks.crf import energies, images
from numpy.typing import NDArray
from scenes import write_raster

from pipeline.crf import torch_engine
from pipeline.crf.engine import engine_named
from pipeline.crf.search import SearchGrid
from workflows.crf_tune import TuneOptions, tune

CLASSES = 6
GRID = SearchGrid(weight=(4.0,), position=(40.0, 80.0), value=(3.0, 13.0))
"""Up to twelve trials: four of the grid, and those half a step around the best."""

SIDE = 512


def crops(side: int, count: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float32]]]:
    """Of the three images in turn: (3, side, side), and probabilities (K, side, side)."""
    whole = [image_CS for _, image_CS in images(SIDE)]
    across = SIDE // side
    for number in range(count):
        image_CS = whole[number % len(whole)]
        row, column = divmod(number // len(whole) % across**2, across)
        window = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
        crop_CS = np.ascontiguousarray(image_CS[:, *window])
        yield crop_CS, np.exp(-energies(crop_CS, CLASSES)).reshape(-1, side, side)


def write_examples(folder: Path, *, side: int, count: int) -> Path:
    """The crops as files, and the list of them; the reference is the brightness without noise."""
    rows = [("image", "scores", "reference")]
    for number, (image_CS, prob_KS) in enumerate(crops(side, count)):
        names = [f"{number}_{what}.tif" for what in rows[0]]
        grey_S = image_CS.mean(0)
        edges = np.quantile(grey_S, np.linspace(0, 1, CLASSES + 1)[1:-1])
        truth_S = np.digitize(grey_S, edges).astype(np.uint8)
        prob_KS = (prob_KS / prob_KS.sum(0)).astype(np.float32)
        for name, values in zip(names, (image_CS, prob_KS, truth_S[None]), strict=True):
            write_raster(folder / name, values, nodata=None)
        rows.append((names[0], names[1], names[2]))
    path = folder / "examples.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def tuned(examples: Path, engine: str, *, together: bool) -> tuple[float, dict[str, Any]]:
    """Seconds of the whole command but for imports, and what it found."""
    engine_named.cache_clear()
    folder = examples.parent
    crf = {
        "engine": engine,
        "smoothness": {"weight": 3, "position": 3},
        "appearance": {
            "weight": 4, "position": 80, "value": 13, "bands": ["red", "green", "blue"],
            "range": [0, 255],
        },
    }  # fmt: skip
    (folder / "crf.yaml").write_text(yaml.safe_dump(crf))
    most = torch_engine.MOST_CACHED if together else 0
    options = TuneOptions(device="cpu", grid=GRID, into=None, tracking="none", experiment="bench")
    with mock.patch.object(torch_engine, "MOST_CACHED", most):
        start = time.perf_counter()
        found = tune(
            examples, folder / "best.yaml", crf=folder / "crf.yaml", legend=None, options=options
        )
    return time.perf_counter() - start, {k: found[k] for k in ("mean_iou", "position", "trials")}


def main() -> None:
    """Print a row a size of crop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megapixels", type=float, default=0.4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64, 128, 256])
    asked = parser.parse_args()
    ways: dict[str, Callable[[Path], tuple[float, dict[str, Any]]]] = {
        "torch, one by one": lambda path: tuned(path, "torch", together=False),
        "torch": lambda path: tuned(path, "torch", together=True),
        "native": lambda path: tuned(path, "native", together=True),
    }
    print(f"{CLASSES} classes, 10 iterations, seconds of the command, least of {asked.repeats}")
    print(f"{'crop':>8}{'crops':>7}" + "".join(f"{name:>20}" for name in ways) + f"{'times':>8}")
    for side in asked.sides:
        count = max(1, int(asked.megapixels * 1e6 / side**2))
        with tempfile.TemporaryDirectory() as folder:
            examples = write_examples(Path(folder), side=side, count=count)
            least, found = dict.fromkeys(ways, np.inf), {}
            for _ in range(asked.repeats):
                for name, way in ways.items():
                    seconds, found[name] = way(examples)
                    least[name] = min(least[name], seconds)
        assert found["torch"] == found["torch, one by one"], found
        one, batch = least["torch, one by one"], least["torch"]
        row = "".join(f"{least[name]:>19.1f}s" for name in ways)
        print(
            f"{side:>5} px{count:>7}{row}{one / batch:>7.2f}x   {os.getloadavg()[0]:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
