"""Pictures for the seam certificate: the worst sample astride a border, and the worst within tiles.

Axes in array names: A red, green, blue and alpha; S space, Y X picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.stitching.certificate import Measured
from workflows.quicklook import painted

HEAT_LOG10 = (-7.0, 0.0)
"""Differences of logits, as powers of ten, that are black and white."""

GAP_PX = 3
ENLARGED = 4


def seam_pictures(
    measured: Sequence[Measured], *, colors: Mapping[int, str], nodata: int
) -> dict[str, Image.Image]:
    """By caption, one strip for each kind of sample that there is.

    Labels that should be, labels of the mask, and the difference of the logits, side by side; of a
    volume the axial plane with the greatest difference.
    """
    pictures = {}
    for kind, name in (("seam", "astride tile borders"), ("interior", "within a tile")):
        of_kind = [one for one in measured if one.sample.kind == kind]
        if of_kind:
            worst = max(of_kind, key=_badness)
            pictures[_caption(worst, name)] = _strip(worst, colors=colors, nodata=nodata)
    return pictures


def _badness(one: Measured) -> tuple[int, float]:
    return int(one.mask_differs.sum()), float(one.delta.max())


def _caption(one: Measured, name: str) -> str:
    axes, region = "zyx"[-one.sample.region.ndim :], one.sample.region
    place = ", ".join(
        f"{axis} {a} to {b}" for axis, a, b in zip(axes, region.start, region.stop, strict=True)
    )
    differ, largest = _badness(one)
    return (
        f"The worst window {name} ({place}): labels of the whole network, labels of the mask"
        f" ({differ:,} differ), and how far the logits lie apart (at most {largest:.2g};"
        f" black is 1e-7 or less, white 1)"
    )


def _strip(one: Measured, *, colors: Mapping[int, str], nodata: int) -> Image.Image:
    delta_YX, wanted_YX, mask_YX = one.delta, one.wanted_S, one.mask_S
    if delta_YX.ndim == 3:
        plane = int(delta_YX.max(axis=(1, 2)).argmax())
        delta_YX, wanted_YX, mask_YX = delta_YX[plane], wanted_YX[plane], mask_YX[plane]
    panels = [
        painted(wanted_YX, colors, nodata=nodata),
        painted(mask_YX, colors, nodata=nodata),
        _heat(delta_YX),
    ]
    gap_YXA = np.zeros((delta_YX.shape[0], GAP_PX, 4), np.uint8)
    strip = np.concatenate([panels[0], gap_YXA, panels[1], gap_YXA, panels[2]], axis=1)
    picture = Image.fromarray(strip, "RGBA")
    size = (picture.width * ENLARGED, picture.height * ENLARGED)
    return picture.resize(size, Image.Resampling.NEAREST)


def _heat(delta_YX: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(Y, X, 4): black, red, yellow, white."""
    low, high = HEAT_LOG10
    level_YX = (np.log10(np.maximum(delta_YX, 10.0**low)) - low) / (high - low)
    bands = [np.clip(3 * level_YX - step, 0, 1) for step in range(3)]
    heat_YXA = np.stack([*bands, np.ones_like(level_YX)], axis=-1)
    return np.asarray(np.rint(255 * heat_YXA), dtype=np.uint8)
