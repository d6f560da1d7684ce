"""A few strokes of a person on a satellite image, and the dense labels that the person accepted.

Doodler made those from the same strokes, by a random forest and a CRF.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NAME = "natural/doodler_coast/LC08_014035_20150215_lr_db_db.npz"
SURE = 0.99
CRF: dict[str, Any] = {
    "smoothness": {"weight": 3, "position": 3},
    "appearance": {
        "weight": 5, "position": 60, "value": 5, "bands": ["red", "green", "blue"],
        "range": [0, 255],
    },
}  # fmt: skip
"""Spreads strokes over what looks alike."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Doodled:
    """An image of a coast, 768 x 768 px."""

    image_CYX: np.ndarray
    """uint8: red, green, blue."""

    strokes_YX: np.ndarray
    """uint8: 0 where nothing was drawn, else the class, from 1."""

    dense_YX: np.ndarray
    """uint8: the class, from 0."""

    names: tuple[str, ...]
    """Of the classes."""


def read_doodles(data: Path) -> Doodled:
    """Read the file. Raises FileNotFoundError where there is none."""
    with np.load(data / NAME) as file:
        return Doodled(
            image_CYX=np.moveaxis(file["image"], -1, 0),
            strokes_YX=file["doodles"],
            dense_YX=file["label"].argmax(-1).astype(np.uint8),
            names=tuple(file["classes"].tolist()),
        )


def stroke_scores(strokes_YX: np.ndarray, *, classes: int) -> np.ndarray:
    """(K, Y, X) float32: nearly sure where something is drawn, elsewhere all classes alike."""
    drawn_KYX = strokes_YX == np.arange(1, classes + 1).reshape(-1, 1, 1)
    prob_KYX = np.where(drawn_KYX, SURE, (1 - SURE) / (classes - 1)).astype(np.float32)
    prob_KYX[:, strokes_YX == 0] = 1 / classes
    return prob_KYX
