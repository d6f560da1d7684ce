"""``make bench-crf``: CRF engines against pydensecrf, in turns within one run, set-up included."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.crf.engine import Engine, EngineName, Pairwise, engine_named

DATA = Path(os.environ.get("TERRAVOX_DATA", "../shared/data"))
IMAGES = {
    "aerial": "natural/doodler_aerial/D800_20160308_222129lr02-0.jpg",
    "river": "natural/doodler_aerial/D800_20160308_222135lr03-3.jpg",
    "coast": "natural/doodler_coast/LC08_014035_20150215_lr_db_db.jpg",
}
DEVIATIONS = ((67, 3), (80, 13))
CLASSES = (2, 6, 21)
ITERATIONS = 10
THREADS = (1, 2)


def images(side: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """The upper left corners, (3, side, side)."""
    for name, path in IMAGES.items():
        image_SC = np.asarray(Image.open(DATA / path).convert("RGB"))[:side, :side]
        yield name, np.moveaxis(image_SC, -1, 0)


def energies(image_CS: NDArray[np.uint8], classes: int) -> NDArray[np.float32]:
    """Noisy, leaning to bands of brightness, (K, N)."""
    rng = np.random.default_rng(0)
    grey_N = image_CS.mean(0).ravel()
    owner_N = np.digitize(grey_N, np.quantile(grey_N, np.linspace(0, 1, classes + 1)[1:-1]))
    logits_KN = rng.normal(0, 1, (classes, owner_N.size))
    logits_KN += 1.5 * (owner_N == np.arange(classes)[:, None])
    log_KN = logits_KN - np.log(np.exp(logits_KN).sum(0))
    return np.ascontiguousarray(-np.maximum(log_KN, np.log(1e-5)), dtype=np.float32)


def kernels(image_CS: NDArray[np.uint8], position: float, value: float) -> list[Pairwise]:
    """Smoothness of 3 px at weight 3, and appearance at weight 4."""
    places_SN = np.indices(image_CS.shape[1:]).reshape(2, -1)[::-1]
    appearance_DN = np.concatenate([places_SN / position, image_CS.reshape(3, -1) / value])
    return [
        Pairwise(features_DN=np.ascontiguousarray(f, dtype=np.float32), compatibility=w)
        for f, w in ((places_SN / 3, 3.0), (appearance_DN, 4.0))
    ]


class PlanKept:
    """An engine that has met the places before, as in a batch of images of one shape."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def mean_field(
        self, energy_KN: NDArray[np.float32], kernels: Sequence[Pairwise], *, iterations: int
    ) -> NDArray[np.float32]:
        """As ``Engine.mean_field``; the first kernel is of places alone."""
        places, *others = kernels
        return self._engine.mean_field(
            energy_KN, [replace(places, recurring=True), *others], iterations=iterations
        )


def engines_named(name: EngineName) -> dict[str, Engine]:
    """What takes turns, the reference first."""
    found: dict[str, Engine] = {"pydensecrf": engine_named("pydensecrf", device="cpu", threads=1)}
    for threads in THREADS:
        engine = engine_named(name, device="cpu", threads=threads)
        found[f"{name} {threads}T"] = engine
        found[f"plan kept {threads}T"] = PlanKept(engine)
    return found


def least_seconds(
    engines: dict[str, Engine],
    energy_KN: NDArray[np.float32],
    pairs: list[Pairwise],
    *,
    repeats: int,
) -> tuple[dict[str, float], dict[str, NDArray[np.float32]]]:
    """The least time of each engine, and what it gave; engines take turns."""
    least: dict[str, float] = {}
    prob: dict[str, NDArray[np.float32]] = {}
    for _ in range(repeats):
        for name, engine in engines.items():
            start = time.perf_counter()
            prob[name] = engine.mean_field(energy_KN, pairs, iterations=ITERATIONS)
            least[name] = min(least.get(name, np.inf), time.perf_counter() - start)
    return least, prob


def main() -> None:
    """Print a row a case: seconds of pydensecrf, how many times faster, and how far apart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engine", choices=("native", "torch"), default="native")
    asked = parser.parse_args()
    engines = engines_named(asked.engine)
    print(f"{asked.side} px a side, {ITERATIONS} iterations, least of {asked.repeats}")
    print(
        f"{'image':8}{'deviations':>12}{'K':>4}{'pydensecrf s':>14}"
        + "".join(f"{name:>14}" for name in list(engines)[1:])
        + f"{'p99.9 |dQ|':>12}{'max |dQ|':>10}{'labels':>10}{'load':>6}"
    )
    for name, image_CS in images(asked.side):
        for position, value in DEVIATIONS:
            for classes in CLASSES:
                energy_KN = energies(image_CS, classes)
                pairs = kernels(image_CS, position, value)
                least, prob = least_seconds(engines, energy_KN, pairs, repeats=asked.repeats)
                slow = least.pop("pydensecrf")
                exact_KN, found_KN = prob["pydensecrf"], prob[f"{asked.engine} 1T"]
                apart = np.abs(found_KN - exact_KN)
                same = (found_KN.argmax(0) == exact_KN.argmax(0)).mean()
                print(
                    f"{name:8}{f'({position}, {value})':>12}{classes:>4}{slow:>14.3f}"
                    + "".join(f"{slow / t:>13.2f}x" for t in least.values())
                    + f"{np.quantile(apart, 0.999):>12.1e}{apart.max():>10.1e}{same:>10.6f}"
                    + f"{os.getloadavg()[0]:>6.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
