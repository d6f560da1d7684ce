"""Probabilities averaged over mirror images of the scene (Chen et al. 2017, section 4.1).

A tile is mirrored where it lies: its place in the scene's mirror image is that of the mirrored
tile, on the stride again, so that tiles still agree.

Axes in array names: C channel, K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.domain import Reach, Region
from pipeline.errors import PlanError
from pipeline.models.frame import Frame
from pipeline.models.scene_mean import GivenMean, OwnMean

_AXES = "zyx"


@dataclass(frozen=True, slots=True)
class Average:
    """Along which axes the scene is mirrored.

    >>> Average.named("flip:yx", dims=2).passes
    ((), (0,), (1,), (0, 1))
    """

    axes: tuple[int, ...] = ()
    """Of S, from 0; none: the image is seen once, as it is."""

    @classmethod
    def named(cls, text: str, *, dims: int) -> Average:
        """``none``, or ``flip:`` and the letters of axes. Raises PlanError."""
        letters = "" if text == "none" else text.removeprefix("flip:")
        known = _AXES[-dims:]
        if not set(letters) <= set(known):
            raise PlanError(f"--average {text}: the axes of this image are {', '.join(known)}")
        return cls(tuple(axis for axis, letter in enumerate(known) if letter in letters))

    @property
    def passes(self) -> tuple[tuple[int, ...], ...]:
        """Axes that each pass mirrors: every combination, none first."""
        counts = range(len(self.axes) + 1)
        return tuple(p for n in counts for p in itertools.combinations(self.axes, n))

    def reach(self, reach: Reach) -> Reach:
        """What all passes together need, for a network of this ``reach``."""
        return reach.both_ways() if self.axes else reach


class Logits(Protocol):
    """Who predicts a tile."""

    def logits(
        self,
        image_CS: NDArray[np.float32],
        frame: Frame,
        *,
        scored: Region,
        pooling: GivenMean | OwnMean | None = None,
    ) -> Tensor:
        """As ``Predictor.logits``."""

    def pooled(self, image_CS: NDArray[np.float32], frame: Frame, *, core: Region) -> Tensor:
        """As ``Predictor.pooled``."""


class AveragedPredictor:
    """A predictor that is asked once for each mirror image."""

    def __init__(self, predictor: Logits, average: Average) -> None:
        self._predictor, self._passes = predictor, average.passes

    def logits(
        self,
        image_CS: NDArray[np.float32],
        frame: Frame,
        *,
        scored: Region,
        pooling: GivenMean | OwnMean | None = None,
    ) -> Tensor:
        """As ``Predictor.logits``: the logarithm of the mean of all probabilities.

        ``pooling`` is of the image as it is, and not to be had of its mirror images.
        """
        assert pooling is None, "the mean of a scene is not that of its mirror image"
        shape, size = frame.shape, image_CS.shape[1:]
        read = Region(frame.origin, tuple(a + n for a, n in zip(frame.origin, size, strict=True)))
        total_KS: Tensor | None = None
        for axes in self._passes:
            logits_KS = self._predictor.logits(
                _mirrored(image_CS, axes),
                Frame.of(read.mirrored(axes, shape=shape), shape=shape),
                scored=scored.mirrored(axes, shape=shape),
            )
            part_KS = logits_KS.log_softmax(dim=0).flip([1 + axis for axis in axes])
            # Not the sum of probabilities: that of a class far behind would be 0, its logarithm
            # no number.
            if total_KS is None:
                total_KS = part_KS
            else:
                torch.logaddexp(total_KS, part_KS, out=total_KS)
        assert total_KS is not None
        return total_KS.sub_(math.log(len(self._passes)))

    def pooled(self, image_CS: NDArray[np.float32], frame: Frame, *, core: Region) -> Tensor:
        """As ``Predictor.pooled``, of the image as it is."""
        return self._predictor.pooled(image_CS, frame, core=core)


def averaged(predictor: Logits, average: Average) -> Logits:
    """The predictor, asked as often as there are passes."""
    return AveragedPredictor(predictor, average) if average.axes else predictor


def _mirrored(image_CS: NDArray[np.float32], axes: tuple[int, ...]) -> NDArray[np.float32]:
    """A copy in the same order of memory, which torch takes; the image where there are no axes."""
    if not axes:
        return image_CS
    return np.flip(image_CS, tuple(1 + axis for axis in axes)).copy(order="K")
