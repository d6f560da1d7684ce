from __future__ import annotations

import numpy as np
import pytest

from pipeline.stitching import keep_core as keep_core_module
from pipeline.stitching.keep_core import to_labels


@pytest.mark.parametrize("at_once", [1, 50, 2**20])
@pytest.mark.parametrize("shape", [(9, 5), (4, 3, 6), (1, 1)])
def test_labels_are_those_of_the_best_scores_however_many_rows_are_taken_at_once(
    shape: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rows of a tile would be left out, or ties go to another class from row to row."""
    monkeypatch.setattr(keep_core_module, "_AT_ONCE", at_once)
    generator = np.random.default_rng(0)
    score_KS = generator.integers(0, 3, (4, *shape)).astype(np.float32)
    valid_S = generator.random(shape) < 0.8
    values = np.array([3, 1, 7, 5], np.uint16)
    labels_S = to_labels(score_KS, valid_S=valid_S, values=values, nodata=65535)
    for place in np.ndindex(shape):
        scores = [float(score_KS[(k, *place)]) for k in range(4)]
        best = values[scores.index(max(scores))]
        assert labels_S[place] == (best if valid_S[place] else 65535)
    assert labels_S.dtype == np.uint16
