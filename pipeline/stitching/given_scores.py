"""Probabilities that somebody else wrote: how they are read, and when they are refused.

Axes in array names: K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.domain import ImageInfo, Region
from pipeline.errors import SourceError, SourceReadError
from pipeline.ports import ArrayStore, Block

FLOAT_SLACK = 0.01
"""How far the probabilities of a pixel may be from a sum of 1: what float16 does to many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredScores:
    """The scores that a run over tiles kept in its store, as a source."""

    store: ArrayStore

    info: ImageInfo
    """As of the image that was segmented, with a channel for each class."""

    name: str
    """All that decides their bytes."""

    def unpack(self) -> None:
        """Nothing is packed: any region can be read."""

    def read(self, region: Region) -> Block:
        """Return ``region``, (K, *S) in the store's dtype. Raises StoreError."""
        return Block(self.store.read(region), np.ones(region.shape, bool))

    def digest(self) -> str:
        """Identity of the content."""
        return self.name


def check_scores(info: ImageInfo, *, name: str) -> None:
    """Refuse what cannot be probabilities of classes. Raises SourceError."""
    if info.dtype != "uint8" and not info.dtype.startswith("float"):
        raise SourceError(
            f"{name} holds {info.dtype}: probabilities are floats from 0 to 1, or uint8 with 255"
            " for 1"
        )
    if len(info.channels) < 2:
        raise SourceError(f"{name} has 1 band: a band for each class, two or more, is needed")
    top = 255.0 if info.dtype == "uint8" else 1.0
    if taken := [value for value in info.nodata if value is not None and 0 <= value <= top]:
        raise SourceError(
            f"{name} says nodata {taken[0]:g}, which is a probability as well: unset it, and mark"
            " pixels without scores by 0 in every band"
        )
    if alpha := [note for note in info.notes if "is alpha" in note]:
        raise SourceError(f"{name}: {alpha[0]}; describe its bands by the names of the classes")


def given_probabilities(block: Block) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Probabilities (K, *S) float32 that sum to 1, and where there are any (*S) bool; new arrays.

    Zeros, one for each class, mean that nobody knows; the probabilities there are 0.

    Raises:
        SourceReadError: values that are no probabilities, such as logits.
    """
    prob_KS, slack = block.image_CS.astype(np.float32), FLOAT_SLACK
    if block.image_CS.dtype == np.uint8:
        prob_KS /= 255
        slack += len(prob_KS) * 0.5 / 255
    valid_S = block.valid_S & prob_KS.any(axis=0)
    prob_KS[:, ~valid_S] = 0
    total_S = prob_KS.sum(axis=0)
    low, off = float(prob_KS.min()), float(np.abs(total_S - 1)[valid_S].max(initial=0))
    if low < 0 or off > slack:
        raise SourceReadError(
            f"the scores are no probabilities: the least is {low:.3g}, a pixel's sum is {off:.3g}"
            " off 1; give the softmax of logits"
        )
    prob_KS /= np.where(valid_S, total_S, np.float32(1))
    return prob_KS, valid_S
