"""Scores from streamed confusion matrices, against scores computed with sets of pixels."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.errors import SourceError
from pipeline.metrics import Confusion


def masks(*, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = np.array([3, 7, 200, 255], np.uint8)
    return rng.choice(values, (40, 31)), rng.choice(values, (40, 31))


def test_figures_equal_those_of_sets_of_pixels() -> None:
    """A wrong axis of the matrix would swap false positives and false negatives."""
    prediction, reference = masks()
    confusion = Confusion([3, 7, 200])
    confusion.add(prediction, reference, ignore=255)
    scores = confusion.scores()
    seen = (prediction != 255) & (reference != 255)
    for k, value in enumerate([3, 7, 200]):
        a = set(np.flatnonzero((prediction == value) & seen))
        b = set(np.flatnonzero((reference == value) & seen))
        assert scores.iou_K[k] == pytest.approx(len(a & b) / len(a | b))
        assert scores.dice_K[k] == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
    assert scores.accuracy == pytest.approx((prediction == reference)[seen].mean())
    assert scores.mean_iou == pytest.approx(scores.iou_K.mean())
    assert confusion.left_out == (~seen).sum()


def test_rows_are_the_reference() -> None:
    """Readers of the matrix would take misses for false alarms."""
    confusion = Confusion([0, 1])
    confusion.add(np.array([1, 1, 0], np.uint8), np.array([0, 0, 0], np.uint8), ignore=None)
    assert confusion.matrix_KK.tolist() == [[1, 2], [0, 0]]


def test_blocks_in_any_order_add_up_to_the_whole() -> None:
    """A score that depended on the tiling would not be a score of the mask."""
    prediction, reference = masks(seed=1)
    whole, parts = Confusion([3, 7, 200]), Confusion([3, 7, 200])
    whole.add(prediction, reference, ignore=255)
    for rows in (slice(25, 40), slice(0, 11), slice(11, 25)):
        parts.add(prediction[rows], reference[rows], ignore=255)
    assert np.array_equal(whole.matrix_KK, parts.matrix_KK)
    assert whole.left_out == parts.left_out


def test_a_class_absent_from_both_masks_is_left_out_of_the_mean() -> None:
    """Counting it as 0 or 1 would move the mean of every scene that lacks a class."""
    confusion = Confusion([0, 1, 2])
    confusion.add(np.array([0, 0, 1], np.uint8), np.array([0, 0, 0], np.uint8), ignore=None)
    scores = confusion.scores()
    assert np.isnan(scores.iou_K[2])
    assert np.isnan(scores.dice_K[2])
    assert scores.iou_K[1] == 0
    assert scores.mean_iou == pytest.approx((2 / 3 + 0) / 2)


def test_nothing_scored_is_nan_and_not_a_crash() -> None:
    """A scene wholly under cloud must still get its report."""
    confusion = Confusion([0, 1])
    confusion.add(np.full(5, 255, np.uint8), np.zeros(5, np.uint8), ignore=255)
    scores = confusion.scores()
    assert np.isnan([scores.accuracy, scores.mean_iou, scores.mean_dice]).all()
    assert confusion.left_out == 5


@pytest.mark.parametrize(
    ("prediction", "reference", "words"),
    [
        (np.zeros(3, np.uint8), np.zeros(4, np.uint8), "differ in shape"),
        (np.array([9], np.uint8), np.array([0], np.uint8), "prediction holds"),
        (np.array([0], np.uint8), np.array([255], np.uint8), "reference holds"),
        (np.zeros(2, np.float32), np.zeros(2, np.uint8), "float32"),
    ],
)
def test_masks_that_cannot_be_compared_are_refused(
    prediction: np.ndarray, reference: np.ndarray, words: str
) -> None:
    """Broadcasting, or dropping unknown values, would give figures of other pixels."""
    with pytest.raises(SourceError, match=words):
        Confusion([0, 1]).add(prediction, reference, ignore=None)


def test_class_ids_of_uint16_masks_are_counted() -> None:
    """Masks with ids above 254 would fail or alias."""
    confusion = Confusion([1, 300])
    mask = np.array([1, 300, 300, 65535], np.uint16)
    confusion.add(mask, mask, ignore=65535)
    assert confusion.matrix_KK.tolist() == [[1, 0], [0, 2]]
