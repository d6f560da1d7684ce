"""``make bench-crf-engines``: an engine of the CRF against pydensecrf, set-up included.

Three real images, side by side in one run.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.crf.engine import Pairwise, engine_named

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("TERRAVOX_DATA", ROOT.parent / "shared" / "data")) / "natural"
IMAGES = (
    "doodler_aerial/D800_20160308_222129lr02-0.jpg",
    "doodler_aerial/D800_20160308_222135lr03-3.jpg",
    "doodler_coast/LC08_014035_20150215_lr_db_db.jpg",
)
SIDE = 512
ITERATIONS = 10


def problem(
    image_YXC: np.ndarray, *, classes: int, position: float, value: float
) -> tuple[np.ndarray, list[Pairwise]]:
    """Energies of noisy scores that follow the brightness, and the papers' two kernels."""
    height, width, _ = image_YXC.shape
    grey_YX = image_YXC.astype(float).sum(-1)
    steps = np.quantile(grey_YX, np.linspace(0, 1, classes + 1)[1:-1])
    noise_KYX = np.random.default_rng(0).normal(0, 1.5, (classes, height, width))
    follows = np.digitize(grey_YX, steps) == np.arange(classes)[:, None, None]
    odds_KN = np.exp(noise_KYX + 2 * follows).reshape(classes, -1)
    energy_KN = -np.log(np.clip(odds_KN / odds_KN.sum(0), 1e-5, 1)).astype(np.float32)
    place_SN = np.indices((height, width)).reshape(2, -1)[::-1]
    rows = [*(place_SN / position), *(image_YXC.reshape(-1, 3).T / value)]
    features = [(place_SN / 3).astype(np.float32), np.stack(rows).astype(np.float32)]
    return np.ascontiguousarray(energy_KN), [
        Pairwise(features_DN=np.ascontiguousarray(part), compatibility=weight)
        for part, weight in zip(features, (3.0, 4.0), strict=True)
    ]


def main() -> None:
    """A line for each image, number of classes and kernel; the least of interleaved repeats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    engines = {"pydensecrf": engine_named("pydensecrf", device="cpu", threads=1)} | {
        f"{n} threads": engine_named(asked.engine, device="cpu", threads=n) for n in asked.threads
    }
    print("image classes position value | p99.9 and max |dQ|, labels equal | times pydensecrf")
    for name in IMAGES:
        image_YXC = np.asarray(Image.open(DATA / name).convert("RGB"))[:SIDE, :SIDE]
        for classes in (2, 6, 21):
            for position, value in ((67, 3), (80, 13)):
                energy_KN, kernels = problem(
                    image_YXC, classes=classes, position=position, value=value
                )
                least, found = dict.fromkeys(engines, np.inf), {}
                for _ in range(asked.repeats):
                    for label, engine in engines.items():
                        start = time.perf_counter()
                        found[label] = engine.mean_field(energy_KN, kernels, iterations=ITERATIONS)
                        least[label] = min(least[label], time.perf_counter() - start)
                wanted_KN, other_KN = found["pydensecrf"], found[f"{asked.threads[0]} threads"]
                apart = np.abs(wanted_KN - other_KN)
                equal = (wanted_KN.argmax(0) == other_KN.argmax(0)).mean()
                times = ", ".join(
                    f"{label} {least['pydensecrf'] / seconds:.2f}"
                    for label, seconds in least.items()
                )
                figures = f"{np.quantile(apart, 0.999):.1e} {apart.max():.1e} {equal:.6f}"
                print(Path(name).stem[-10:], classes, position, value, "|", figures, "|", times)


if __name__ == "__main__":
    main()
