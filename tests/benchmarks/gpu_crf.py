"""``make bench-gpu-crf``: the torch engine on a GPU, set-up and iterations apart.

Beside pydensecrf on one core of the same machine, and beside the time in which the GPU's memory
moves what an iteration must touch. ``ARGS='--device cpu --side 512'`` tries the program where
there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from benchmarks.crf import DEVIATIONS, ITERATIONS, energies, images, kernels
from numpy.typing import NDArray

from pipeline.crf.engine import Engine, Pairwise, engine_named
from pipeline.crf.torch_lattice import number_vertices, simplices

CLASSES = (6, 21)

FLOAT = 4
"""Bytes of a number, and of a row's index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """Seconds of one image."""

    set_up: float
    iterations: float

    @property
    def total(self) -> float:
        """Of set-up and iterations."""
        return self.set_up + self.iterations


def taken(
    engine: Engine, energy_KN: NDArray[np.float32], pairs: Sequence[Pairwise], *, repeats: int
) -> Taken:
    """The least of several; iterations are what more of them cost, all else is set-up."""
    least = []
    for iterations in (1, 1 + ITERATIONS):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            engine.mean_field(energy_KN, pairs, iterations=iterations)
            times.append(time.perf_counter() - start)
        least.append(min(times))
    loop = least[1] - least[0]
    return Taken(set_up=least[0] - loop / ITERATIONS, iterations=loop)


def touched_bytes(pairs: Sequence[Pairwise], *, classes: int, device: str) -> int:
    """What one iteration reads and writes at least: each array once in each step that needs it."""
    pixels, others, total = pairs[0].features_DN.shape[1], classes - 1, 0
    for pair in pairs:
        axes = len(pair.features_DN) + 1
        entries = axes * pixels * 2 * FLOAT  # whose row, and its weight
        rows = vertices(pair.features_DN, device=device)
        splat = entries + pixels * others * FLOAT + rows * others * FLOAT
        blur = axes * (rows * 2 * FLOAT + 2 * rows * others * FLOAT)
        total += splat + blur + entries + rows * others * FLOAT
    return total + 4 * pixels * others * FLOAT  # messages, unary energies, probabilities in and out


def vertices(features_DN: NDArray[np.float32], *, device: str) -> int:
    """Of the lattice, that pixels touch."""
    corner_VN, rank_VN, _ = simplices(torch.from_numpy(features_DN).to(device))
    key_VN, _ = number_vertices(corner_VN, rank_VN, [features_DN.shape[1]])
    return sum(len(key_N.unique()) for key_N in key_VN)  # each kind has keys of its own


def memory_rate(device: str) -> float:
    """Bytes a second that a copy reads and writes."""
    one = torch.zeros(2**28 if device == "cuda" else 2**25, device=device)
    other = torch.empty_like(one)
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(4):
            other.copy_(one)
        float(other[0])  # waits until all that was asked for is done
        best = max(best, 4 * 2 * one.nbytes / (time.perf_counter() - start))
    return best


def grown(image_CS: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Mirrored until it has so many pixels a side."""
    fill = [(0, 0), *((0, max(0, side - n)) for n in image_CS.shape[1:])]
    return np.pad(image_CS, fill, mode="symmetric")


def main() -> None:
    """Print a row for each image, pair of deviations and number of classes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--side", type=int, default=2048, help="of what the GPU is given, in px")
    parser.add_argument("--reference-side", type=int, default=512, help="of pydensecrf's, in px")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    engine = engine_named("torch", device=asked.device, threads=1)
    reference = engine_named("pydensecrf", device="cpu", threads=1)
    rate = memory_rate(asked.device)
    card = torch.cuda.get_device_name() if asked.device == "cuda" else "one thread"
    print(f"{card}, {rate / 1e9:.0f} GB/s, {ITERATIONS} iterations, Mpx/s")
    print(
        f"{'image':8}{'deviations':>12}{'K':>4}{'set-up':>9}{'loop':>9}{'both':>9}"
        f"{'pydensecrf':>12}{'times':>8}{'floor/loop':>12}"
    )
    for name, image_CS in images(asked.side):
        large_CS = grown(image_CS, asked.side)
        corner_CS = image_CS[:, : asked.reference_side, : asked.reference_side]
        for (position, value), classes in itertools.product(DEVIATIONS, CLASSES):
            slow, slow_px = timed(reference, corner_CS, position, value, classes, repeats=1)
            found, pixels = timed(engine, large_CS, position, value, classes, repeats=asked.repeats)
            pairs = kernels(large_CS, position, value)
            floor = touched_bytes(pairs, classes=classes, device=asked.device) / rate
            print(
                f"{name:8}{f'({position}, {value})':>12}{classes:>4}"
                f"{pixels / found.set_up:>9.2f}{pixels / found.iterations:>9.2f}"
                f"{pixels / found.total:>9.2f}{slow_px / slow.total:>12.3f}"
                f"{pixels / found.total / slow_px * slow.total:>7.1f}x"
                f"{floor * ITERATIONS / found.iterations:>11.1%}",
                flush=True,
            )


def timed(
    engine: Engine,
    image_CS: NDArray[np.uint8],
    position: float,
    value: float,
    classes: int,
    *,
    repeats: int,
) -> tuple[Taken, float]:
    """What an engine takes of an image, and millions of its pixels."""
    energy_KN, pairs = energies(image_CS, classes), kernels(image_CS, position, value)
    return taken(engine, energy_KN, pairs, repeats=repeats), image_CS[0].size / 1e6


if __name__ == "__main__":
    main()
