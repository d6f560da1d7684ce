"""``make bench-scribbles``: strokes of a person become dense labels, by what one might pick for it.

All strokes, and those that lie in some blocks of 32 px alone, as if less had been drawn. The
labels that they are held against were made by Doodler from all of the strokes, and accepted.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from doodles import CRF, Doodled, read_doodles, stroke_scores
from numpy.typing import NDArray
from PIL import Image
from scenes import write_raster
from scipy.ndimage import distance_transform_edt
from sklearn.ensemble import RandomForestClassifier

from adapters.uri import open_source
from pipeline.crf.params import CrfParams
from pipeline.domain import Region
from pipeline.metrics import Confusion, Scores
from workflows.config import RefineOptions
from workflows.demo.baseline import GaussianClassifier
from workflows.refining import refine

DATA = Path(os.environ.get("TERRAVOX_DATA", "../shared/data"))
BLOCK = 32
SHARES = (1, 4, 16)
"""One block in so many keeps its strokes."""

DRAWS = 5
"""Of those blocks."""

COLORS = np.array([(43, 108, 176), (229, 231, 235), (234, 179, 8), (22, 101, 52)], np.uint8)
"""Water, surf, sand, development."""


def thinned(doodled: Doodled, share: int, *, seed: int) -> NDArray[np.uint8]:
    """Strokes (Y, X) in one block of ``share`` of each class, at least one."""
    strokes_YX = doodled.strokes_YX
    rng, kept_YX = np.random.default_rng(seed), np.zeros_like(strokes_YX)
    rows, columns = (np.arange(n) // BLOCK for n in strokes_YX.shape)
    block_YX = rows[:, None] * (columns[-1] + 1) + columns
    for label in range(1, len(doodled.names) + 1):
        drawn_YX = strokes_YX == label
        blocks = np.unique(block_YX[drawn_YX])
        chosen = rng.choice(blocks, max(1, len(blocks) // share), replace=False)
        kept_YX[drawn_YX & np.isin(block_YX, chosen)] = label
    return kept_YX


def nearest(doodled: Doodled, strokes_YX: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The class of the nearest stroke."""
    at = distance_transform_edt(strokes_YX == 0, return_distances=False, return_indices=True)
    return strokes_YX[tuple(at)] - np.uint8(1)


def gaussian(doodled: Doodled, strokes_YX: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The likeliest class of each pixel's colour, a Gaussian for each class."""
    pixels = [(doodled.image_CYX, strokes_YX.astype(np.int16) - 1)]
    return GaussianClassifier.fit(pixels, classes=len(doodled.names)).predict(doodled.image_CYX)


def forest_scores(
    features_FYX: NDArray[np.generic], strokes_YX: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """(K, Y, X): what a forest that learned the strokes makes of each pixel by itself."""
    features_NF, label_N = features_FYX.reshape(len(features_FYX), -1).T, strokes_YX.ravel()
    forest = RandomForestClassifier(100, min_samples_leaf=5, random_state=0, n_jobs=2)
    forest.fit(features_NF[label_N > 0], label_N[label_N > 0])
    prob_NK = forest.predict_proba(features_NF)
    return prob_NK.T.reshape(-1, *strokes_YX.shape).astype(np.float32)


def by_colour(doodled: Doodled, strokes_YX: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A forest that sees the colours of a pixel."""
    return forest_scores(doodled.image_CYX, strokes_YX).argmax(0).astype(np.uint8)


def by_colour_and_place(doodled: Doodled, strokes_YX: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """And one that sees its row and column as well."""
    features_FYX = np.concatenate([doodled.image_CYX, np.indices(strokes_YX.shape)])
    return forest_scores(features_FYX, strokes_YX).argmax(0).astype(np.uint8)


def by_forest_and_crf(
    doodled: Doodled, strokes_YX: NDArray[np.uint8], folder: Path
) -> NDArray[np.uint8]:
    """The CRF of the strokes, and of what the forest of colours says where there are none."""
    drawn_KYX = stroke_scores(strokes_YX, classes=len(doodled.names))
    guessed_KYX = forest_scores(doodled.image_CYX, strokes_YX)
    return by_crf(np.where(strokes_YX > 0, drawn_KYX, guessed_KYX), folder)


def by_crf(prob_KYX: NDArray[np.float32], folder: Path) -> NDArray[np.uint8]:
    """What ``terravox refine`` makes of scores, guided by ``image.tif`` beside them."""
    scores = write_raster(folder / "scores.tif", prob_KYX, nodata=None)
    options = RefineOptions(backend="serial", tracking_uri="none", device="cpu", fresh=True)
    crf = CrfParams.from_mapping(CRF)
    refine(folder / "image.tif", folder / "mask.tif", scores=scores, crf=crf, options=options)
    mask = open_source(str(folder / "mask.tif"))
    found_YX: NDArray[np.uint8] = mask.read(Region.whole(mask.info.shape)).image_CS[0]
    return found_YX


def score(doodled: Doodled, found_YX: NDArray[np.uint8]) -> Scores:
    """Against the labels that were accepted."""
    confusion = Confusion(range(len(doodled.names)))
    confusion.add(found_YX, doodled.dense_YX, ignore=None)
    return confusion.scores()


def ways(folder: Path) -> dict[str, Callable[[Doodled, NDArray[np.uint8]], NDArray[np.uint8]]]:
    """From strokes to labels, by name."""
    return {
        "nearest stroke": nearest,
        "Gaussian of colours": gaussian,
        "forest of colours": by_colour,
        "forest of colours and place": by_colour_and_place,
        "CRF": lambda d, s: by_crf(stroke_scores(s, classes=len(d.names)), folder),
        "forest of colours, then CRF": lambda d, s: by_forest_and_crf(d, s, folder),
    }


def image_and_strokes(doodled: Doodled, strokes_YX: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Side by side, (Y, 2X, 3)."""
    light_YXC = np.moveaxis(np.clip(doodled.image_CYX * 1.6, 0, 255).astype(np.uint8), 0, -1)
    colors_YXC = np.concatenate([COLORS[:1], COLORS])[strokes_YX]
    drawn_YXC = np.where(strokes_YX[..., None] > 0, colors_YXC, light_YXC)
    return np.concatenate([light_YXC, drawn_YXC], axis=1)


def row(name: str, drawn: float, told: list[Scores]) -> str:
    """Mean over the draws; least and most of the mean IoU."""
    ious = [scores.mean_iou for scores in told]
    return (
        f"{drawn:>7.1%}  {name:29}{np.mean([s.accuracy for s in told]):>8.1%}"
        f"{np.mean(ious):>10.3f}  {min(ious):.3f}..{max(ious):.3f}"
        + "".join(f"{iou:>8.3f}" for iou in np.mean([s.iou_K for s in told], axis=0))
    )


def main() -> None:
    """Print a row for each way and share of the strokes, and draw the first of each share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench-out/scribbles"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    doodled, rows = read_doodles(DATA), []
    write_raster(asked.out / "image.tif", doodled.image_CYX, nodata=None, photometric="RGB")
    print(
        f"{'drawn':>7}  {'way':29}{'agree':>8}{'mean IoU':>10}{'least..most':>14}"
        + "".join(f"{name:>8}" for name in doodled.names)
    )
    for share in SHARES:
        drawn = [thinned(doodled, share, seed=seed) for seed in range(DRAWS if share > 1 else 1)]
        panels = [image_and_strokes(doodled, drawn[0])]
        for name, way in ways(asked.out).items():
            found = [way(doodled, strokes_YX) for strokes_YX in drawn]
            told = [score(doodled, found_YX) for found_YX in found]
            covered = float(np.mean([(strokes_YX > 0).mean() for strokes_YX in drawn]))
            print(row(name, covered, told), flush=True)
            panels.append(COLORS[found[0]])
        rows.append(np.concatenate([*panels, COLORS[doodled.dense_YX]], axis=1))
    sheet = Image.fromarray(np.concatenate(rows)[::2, ::2])
    sheet.save(asked.out / "scribbles.png")
    print(f"picture: {asked.out / 'scribbles.png'}: image, strokes, the ways in order, accepted")


if __name__ == "__main__":
    main()
