"""A few strokes of a person on a satellite image, spread over all of it by the CRF alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from doodles import CRF, NAME, read_doodles, stroke_scores
from real_files import labels_of
from scenes import write_raster

from pipeline.crf.params import CrfParams
from workflows.config import RefineOptions
from workflows.refining import refine


def test_scribbles_become_the_dense_labels_that_the_person_accepted(data: Path, tmp_path: Path):
    """Scores that know 21 % of the pixels: without the guide, or in wrong units, they stay sparse.

    Doodler's own labels, made from the same strokes by a classifier and a CRF, agree in 97 %.
    """
    if not (data / NAME).is_file():
        pytest.skip(f"no {NAME} at {data}")
    doodled = read_doodles(data)
    strokes_YX, dense_YX = doodled.strokes_YX, doodled.dense_YX
    prob_KYX = stroke_scores(strokes_YX, classes=len(doodled.names))
    image = write_raster(tmp_path / "image.tif", doodled.image_CYX, nodata=None, photometric="RGB")
    scores = write_raster(tmp_path / "scores.tif", prob_KYX, nodata=None)
    options = RefineOptions(backend="serial", tracking_uri="none", device="cpu")
    crf = CrfParams.from_mapping(CRF | {"engine": "torch"})
    refine(image, tmp_path / "mask.tif", scores=scores, crf=crf, options=options)
    labels_YX = labels_of(tmp_path / "mask.tif")
    known_YX, land_YX = prob_KYX.argmax(0) == dense_YX, dense_YX > 0
    assert known_YX[land_YX].mean() < 0.4
    assert (labels_YX == dense_YX)[land_YX].mean() > 0.85
    assert (labels_YX == dense_YX).mean() > 0.95
    drawn_YX = strokes_YX > 0
    assert (labels_YX == strokes_YX - 1)[drawn_YX].mean() > 0.97
