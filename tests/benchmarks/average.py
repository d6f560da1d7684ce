"""``make bench-average``: what a mean over sizes costs in tiles, and how far it is from one pass.

Halo and work are counted. Equality and speed are measured, fp32, over a strip that is longer than
the halo: tiles against the whole strip, resized by torch's own interpolation, in float64.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.domain import Grid, Halo, Pass, Region
from pipeline.inference.average import Average, averaged
from pipeline.inference.precision import Precision
from pipeline.inference.predictor import WINDOW, Predictor
from pipeline.inference.tile_cost import CostModel
from pipeline.models.bundle import Bundle
from pipeline.models.frame import Frame
from pipeline.models.fresh import new_bundle
from pipeline.models.published import published
from pipeline.models.receptive_field import reach_of
from pipeline.models.stages import stages_of

SIZES = "0.5,0.75,1,1.25,1.5,1.75"
"""Of the papers' last rows."""

AVERAGES = ("none", f"scale:{SIZES}", f"scale:{SIZES}+flip:x")
NETWORKS = {
    "slim": published("v3", "slim"),
    "resnet18": published("v3", "resnet18", output_stride=16),
    "resnet50": published("v3", "resnet50", output_stride=16),
}
CLASSES = 6
FP32 = Precision(name="fp32", channels_last=True, why="asked")


def sweep_of(average: Average, *, shape: tuple[int, int], side: int) -> Pass:
    reach = average.reach
    grid = Grid(shape=shape, tile=(side, side), stride=reach.stride, endpoint=reach.endpoint)
    none = Halo.uniform(0, ndim=2)
    return Pass(case="", name="", grid=grid, reach=reach, crf_halo=none)


def counted(bundle: Bundle, average: Average) -> tuple[int, int, float]:
    """Halo in px, work of one pass over the scene, and that of an inner tile over its share."""
    sweep, network = sweep_of(average, shape=(20480, 20480), side=4096), bundle.network()
    model = CostModel(
        chain=stages_of(network), live_px=0, classes=CLASSES, window=WINDOW, hosted=False,
        canonical_px=None, itemsize=4, pixel_bytes=3, shape=sweep.grid.padded_shape,
        scores=False, guided=False, average=average,
    )  # fmt: skip
    ratio = model.of(sweep.tile(12)).work * len(sweep.grid) / model.scene_work
    return average.reach.halo_with_window.largest, model.scene_work, ratio


def one_pass(bundle: Bundle, scene_CS: NDArray[np.float32]) -> Tensor:
    """(K, *S) logarithm of the mean over the sizes, of the scene in one piece; float64."""
    network, scene_BCS, parts = bundle.network().double(), torch.from_numpy(scene_CS)[None], []
    for factor in map(Fraction, SIZES.split(",")):
        size = tuple(int(side * factor) for side in scene_BCS.shape[2:])
        image_BCS = F.interpolate(scene_BCS.double(), size=size, mode="bilinear")
        with torch.inference_mode():
            scores_BKS = network.coarse_logits(image_BCS, Frame((0, 0), size))
        fine_BKS = F.interpolate(scores_BKS, size=scene_BCS.shape[2:], mode="bilinear")
        parts.append(fine_BKS.log_softmax(1)[0])
    return torch.stack(parts).logsumexp(0) - math.log(len(parts))


def in_tiles(
    bundle: Bundle, average: Average, scene_CS: NDArray[np.float32], *, side: int
) -> tuple[Tensor, float]:
    """(K, *S) of the same in tiles, and seconds."""
    predictor = averaged(
        Predictor(bundle, device="cpu", precision=FP32, context="window", threads=1), average
    )
    sweep = sweep_of(average, shape=scene_CS.shape[1:], side=side)
    whole = Region.whole(sweep.grid.padded_shape)
    result_KS = torch.empty(CLASSES, *scene_CS.shape[1:])
    start = time.perf_counter()
    for tile in sweep.tiles():
        part_CS = scene_CS[(slice(None), *tile.read.slices(within=whole))]
        frame = Frame.of(tile.read, shape=whole.shape)
        logits_KS = predictor.logits(part_CS.copy(), frame, scored=tile.core)
        result_KS[(slice(None), *tile.core.slices(within=whole))] = logits_KS
    return result_KS, time.perf_counter() - start


def measured(bundle: Bundle, *, length: int) -> str:
    """Difference, labels and speed on a strip, as cells of a row."""
    scene_CS = np.random.default_rng(0).normal(size=(3, 128, length)).astype(np.float32)
    own = reach_of(bundle.network())
    alone, sizes = (Average.named(text, own=own) for text in AVERAGES[:2])
    _, once = in_tiles(bundle, alone, scene_CS, side=length)
    found_KS, seconds = in_tiles(bundle, sizes, scene_CS, side=512)
    wanted_KS = one_pass(bundle, scene_CS)
    worst = (found_KS - wanted_KS).abs().max() / wanted_KS.std()
    unlike = int((found_KS.argmax(0) != wanted_KS.argmax(0)).sum())
    return f"{worst:.1e} | {unlike} of {found_KS[0].numel()} | {seconds / once:.1f}"


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, nargs="*", default=list(NETWORKS))
    asked = parser.parse_args()
    print("| network | average | halo, px | work | inner tile of 4096 px |", end="")
    print(" deviation | labels | time |\n" + "|---" * 8 + "|")
    for name in asked.network:
        with tempfile.TemporaryDirectory() as folder:
            bundle = new_bundle(
                Path(folder) / "b", architecture=NETWORKS[name], bands=3, classes=CLASSES, seed=7
            )
            bundle = replace(bundle, crop=(256, 256))
            base = 0
            for text in AVERAGES:
                average = Average.named(text, own=reach_of(bundle.network()))
                halo, work, ratio = counted(bundle, average)
                base = base or work
                cells = measured(bundle, length=4096) if text == AVERAGES[1] else "| |"
                head = f"| {name} | {text} | {halo} | x{work / base:.2f} | {ratio:.2f} |"
                print(f"{head} {cells} |", flush=True)


if __name__ == "__main__":
    main()
