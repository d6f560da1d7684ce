"""How well a mask agrees with a reference, summed over any number of tiles.

Axes in array names: K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError

_VALUES = 1 << 16
"""Masks are uint8 or uint16, so that a table of this length maps a value to its class."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """Figures per class, in the order of the class ids; NaN for a class absent from both masks."""

    iou_K: NDArray[np.float64]
    """(K,) float64 in [0, 1] or NaN: intersection over union."""

    dice_K: NDArray[np.float64]
    """(K,) float64 in [0, 1] or NaN: twice the intersection over the sum of both."""

    accuracy: float
    """Share of the scored pixels that agree; NaN where nothing was scored."""

    mean_iou: float
    """Mean of ``iou_K`` over the classes present; NaN where there are none."""

    mean_dice: float
    """Mean of ``dice_K`` over the classes present; NaN where there are none."""


class Confusion:
    """A confusion matrix that is filled block by block, and flat in memory.

    >>> confusion = Confusion([0, 1, 7])
    >>> confusion.add(np.uint8([0, 1, 1, 7]), np.uint8([0, 1, 7, 255]), ignore=255)
    >>> confusion.matrix_KK.tolist(), confusion.left_out
    ([[1, 0, 0], [0, 1, 0], [0, 1, 0]], 1)
    """

    def __init__(self, classes: Sequence[int]) -> None:
        """Count the classes with these ids, which are the values in the masks.

        Raises:
            SourceError: Where an id is repeated or no value of a mask.
        """
        if len(set(classes)) != len(classes) or not all(0 <= c < _VALUES for c in classes):
            raise SourceError(f"class ids must differ and lie in 0..65535, got {list(classes)}")
        self.classes = tuple(classes)
        self.left_out = 0
        """Pixels not scored, because either mask held the ignored value."""
        self.matrix_KK = np.zeros((len(classes), len(classes)), np.int64)
        """(K, K) pixel counts; rows are the reference, columns the prediction."""
        self._index = np.full(_VALUES, -1, np.int64)
        self._index[list(classes)] = np.arange(len(classes))

    def add(
        self, prediction_S: NDArray[Any], reference_S: NDArray[Any], *, ignore: int | None
    ) -> None:
        """Count one block; pixels where either mask is ``ignore`` are left out, and counted.

        Args:
            prediction_S: (*S) class ids, an unsigned integer type of at most 16 bits.
            reference_S: The same shape and kind.
            ignore: The value of nodata in both; None where there is none.

        Raises:
            SourceError: Where shapes differ or a mask holds a value that is no class.
        """
        if prediction_S.shape != reference_S.shape:
            raise SourceError(
                f"prediction {prediction_S.shape} and reference {reference_S.shape} differ in"
                " shape: compare masks of one grid"
            )
        scored_S = np.ones(reference_S.shape, bool)
        if ignore is not None:
            scored_S = (prediction_S != ignore) & (reference_S != ignore)
        predicted = self._indices(prediction_S[scored_S], name="prediction")
        expected = self._indices(reference_S[scored_S], name="reference")
        count = len(self.classes)
        pairs = np.bincount(expected * count + predicted, minlength=count * count)
        self.matrix_KK += pairs.reshape(count, count)
        self.left_out += scored_S.size - predicted.size

    def scores(self) -> Scores:
        """The figures of everything added so far."""
        hit_K = self.matrix_KK.diagonal().astype(np.float64)
        sum_K = (self.matrix_KK.sum(axis=0) + self.matrix_KK.sum(axis=1)).astype(np.float64)
        present_K = sum_K > 0
        nan_K = np.full(len(self.classes), np.nan)
        iou_K = np.divide(hit_K, sum_K - hit_K, out=nan_K.copy(), where=present_K)
        dice_K = np.divide(2 * hit_K, sum_K, out=nan_K, where=present_K)
        total = int(self.matrix_KK.sum())
        return Scores(
            iou_K=iou_K,
            dice_K=dice_K,
            accuracy=float(hit_K.sum()) / total if total else float("nan"),
            mean_iou=float(iou_K[present_K].mean()) if total else float("nan"),
            mean_dice=float(dice_K[present_K].mean()) if total else float("nan"),
        )

    def _indices(self, values: NDArray[Any], *, name: str) -> NDArray[np.int64]:
        if values.dtype.kind != "u" or values.dtype.itemsize > 2:
            raise SourceError(f"the {name} is {values.dtype}: a mask is uint8 or uint16")
        indices: NDArray[np.int64] = self._index[values]
        if values.size and indices.min() < 0:
            unknown = sorted({int(v) for v in np.unique(values[indices < 0])})
            raise SourceError(
                f"the {name} holds {unknown[:5]}, which are none of the classes"
                f" {list(self.classes)}: name them, or the value to ignore"
            )
        return indices
