"""A few strokes of a person on a satellite image, spread over all of it by the CRF alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from real_files import labels_of
from scenes import write_raster

from pipeline.crf.params import CrfParams
from workflows.config import RefineOptions
from workflows.refine import refine

NAME = "natural/doodler_coast/LC08_014035_20150215_lr_db_db.npz"
SURE = 0.99
CRF = {
    "engine": "torch",
    "smoothness": {"weight": 3, "position": 3},
    "appearance": {
        "weight": 5, "position": 60, "value": 5, "bands": ["red", "green", "blue"],
        "range": [0, 255],
    },
}  # fmt: skip


def test_scribbles_become_the_dense_labels_that_the_person_accepted(data: Path, tmp_path: Path):
    """Scores that know 11 % of the pixels: without the guide, or in wrong units, they stay sparse.

    Doodler's own labels, made from the same strokes by a classifier and a CRF, agree in 97 %.
    """
    if not (data / NAME).is_file():
        pytest.skip(f"no {NAME} at {data}")
    with np.load(data / NAME) as file:
        image_CYX = np.moveaxis(file["image"], -1, 0)
        strokes_YX = file["doodles"].astype(np.int64)
        dense_YX, names = file["label"].argmax(-1), file["classes"].tolist()
    drawn_KYX = strokes_YX == np.arange(1, len(names) + 1).reshape(-1, 1, 1)
    prob_KYX = np.where(drawn_KYX, SURE, (1 - SURE) / (len(names) - 1)).astype(np.float32)
    prob_KYX[:, strokes_YX == 0] = 1 / len(names)
    image = write_raster(tmp_path / "image.tif", image_CYX, nodata=None, photometric="RGB")
    scores = write_raster(tmp_path / "scores.tif", prob_KYX, nodata=None)
    options = RefineOptions(backend="serial", tracking_uri="none", device="cpu")
    crf = CrfParams.from_mapping(CRF)
    refine(image, tmp_path / "mask.tif", scores=scores, crf=crf, options=options)
    labels_YX = labels_of(tmp_path / "mask.tif")
    known_YX, land_YX = prob_KYX.argmax(0) == dense_YX, dense_YX > 0
    assert known_YX[land_YX].mean() < 0.4
    assert (labels_YX == dense_YX)[land_YX].mean() > 0.85
    assert (labels_YX == dense_YX).mean() > 0.95
    assert (labels_YX == strokes_YX - 1)[strokes_YX > 0].mean() > 0.97
