"""Class probabilities, kept only when somebody asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.domain import Region
from pipeline.ports import ArrayStore

ScoreType = Literal["uint8", "float16"]


def softmax(logit_KS: NDArray[np.float32]) -> NDArray[np.float32]:
    """(K, *S) float32, sums to 1 over K; a new array."""
    prob_KS: NDArray[np.float32] = np.exp(logit_KS - logit_KS.max(axis=0, keepdims=True))
    prob_KS /= prob_KS.sum(axis=0, keepdims=True)
    return prob_KS


@dataclass(frozen=True, slots=True)
class ScoreSink:
    """Writes probabilities as float16, or as uint8 with 255 for 1; all zero where invalid."""

    store: ArrayStore
    dtype: ScoreType

    def write(
        self, core: Region, prob_KS: NDArray[np.float32], *, valid_S: NDArray[np.bool_]
    ) -> str:
        """Store the probabilities of one core; SHA-256 of what was stored. Raises StoreError."""
        scores_KS: NDArray[Any] = np.where(valid_S, prob_KS, np.float32(0))
        if self.dtype == "uint8":
            scores_KS = np.rint(scores_KS * 255.0)
        return self.store.write(core, scores_KS.astype(self.dtype))
