"""How much of each value a tile's mask holds."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.domain import Graticule, Region


class Tally(NamedTuple):
    """Of each value that occurs."""

    counts: dict[int, int]
    """Pixels."""

    areas: dict[int, float]
    """In m2; empty where all pixels of the image are alike."""

    @classmethod
    def of(cls, labels_S: NDArray[Any], *, core: Region, graticule: Graticule | None) -> Tally:
        """Of the mask over ``core``, whose rows differ where there is a ``graticule``."""
        if graticule is None:
            values, found = np.unique(labels_S, return_counts=True)
            return cls(dict(zip(values.tolist(), found.tolist(), strict=True)), {})
        counts_V = np.zeros(int(labels_S.max()) + 1, np.int64)
        areas_V = np.zeros(len(counts_V))
        for row, labels_X in zip(range(core.start[0], core.stop[0]), labels_S, strict=True):
            row_V = np.bincount(labels_X, minlength=len(counts_V))
            counts_V += row_V
            areas_V += row_V * graticule.pixel_m2(row, row + 1)
        values_N = np.flatnonzero(counts_V)
        return cls(
            {int(value): int(counts_V[value]) for value in values_N},
            {int(value): float(areas_V[value]) for value in values_N},
        )
