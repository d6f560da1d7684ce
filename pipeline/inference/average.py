"""Probabilities averaged over the scene at several sizes and its mirror images.

Chen et al. 2017 (arXiv 1706.05587), section 4.1: scores at every scale and mirror image are
resized to the image, and the mean of their softmax taken. A tile is resized and mirrored where it
lies: its place in the other scene is that of the other tile, on the stride again, so that tiles
still agree.

Axes in array names: C channel, K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.domain import Reach, Region, Shape
from pipeline.errors import PlanError
from pipeline.inference.normalise import Image
from pipeline.inference.zoom import NATURAL, Zoom
from pipeline.models.frame import Frame
from pipeline.models.scene_mean import GivenMean, OwnMean

if TYPE_CHECKING:
    from torch import Tensor

_AXES = "zyx"

_LEAST, _MOST, _PARTS = Fraction(1, 4), Fraction(4), 4
"""Factors of size that are taken: quarters, so that tiles lie on 4 strides at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """How often, and how, a network sees a tile: at every zoom, every mirror image."""

    own: Reach
    """Of the network, in pixels of what it sees."""

    zooms: tuple[Zoom, ...] = (NATURAL,)

    axes: tuple[int, ...] = ()
    """Of S, from 0, along which the scene is mirrored as well."""

    @classmethod
    def named(cls, text: str, *, own: Reach) -> Average:
        """``none``, or ``flip:yx``, ``scale:0.75,1,1.25``, or both with ``+`` between them.

        Raises PlanError.
        """
        known, axes = _AXES[-len(own.halo.before) :], ""
        zooms: tuple[Zoom, ...] = (NATURAL,)
        for part in () if text == "none" else text.split("+"):
            kind, _, values = part.partition(":")
            if kind == "flip":
                axes = values
            else:
                zooms = tuple(_zoom(factor) for factor in values.split(","))
        if not set(axes) <= set(known):
            raise PlanError(f"--average {text}: the axes of this image are {', '.join(known)}")
        if len(set(axes)) < len(axes) or len(set(zooms)) < len(zooms):
            raise PlanError(f"--average {text} names a size or an axis twice: name each once")
        return cls(
            own=own,
            zooms=zooms,
            axes=tuple(axis for axis, letter in enumerate(known) if letter in axes),
        )

    @property
    def mirrors(self) -> tuple[tuple[int, ...], ...]:
        """Axes that are mirrored at once: every combination, none first."""
        counts = range(len(self.axes) + 1)
        return tuple(p for n in counts for p in itertools.combinations(self.axes, n))

    @property
    def passes(self) -> int:
        """Times that the network sees a tile."""
        return len(self.zooms) * len(self.mirrors)

    @property
    def alone(self) -> bool:
        """Whether the network sees the scene once, as it is."""
        return self.zooms == (NATURAL,) and not self.axes

    @property
    def reach(self) -> Reach:
        """What all passes together need of the scene, in its pixels."""
        return functools.reduce(Reach.__or__, (self._reach(zoom) for zoom in self.zooms))

    def part(self, zoom: Zoom, read: Region, *, scored: Region, shape: Shape) -> Region:
        """What the passes at a zoom need of ``read`` for ``scored``, in a scene of ``shape``.

        Small scenes make halos wide, which large ones then need not compute.
        """
        reach = self._reach(zoom)
        return reach.read(scored.align(reach.stride).clip(shape), shape=shape) & read

    def _reach(self, zoom: Zoom) -> Reach:
        stride = math.lcm(*(each.stride(self.own.stride) for each in self.zooms))
        reach = zoom.reach(self.own, stride=stride)
        return reach.both_ways() if self.axes else reach


def _zoom(text: str) -> Zoom:
    factor = Fraction(text)
    if not _LEAST <= factor <= _MOST or (factor * _PARTS).denominator > 1:
        raise PlanError(
            f"--average scale:{text}: sizes are quarters from {float(_LEAST)} to {_MOST}, such as"
            " 0.5, 0.75 or 1.25: at others tiles would not lie on whole pixels"
        )
    return Zoom(factor.numerator, factor.denominator)


class Logits(Protocol):
    """Who predicts a tile."""

    def logits(
        self,
        image_CS: Image,
        frame: Frame,
        *,
        scored: Region,
        pooling: GivenMean | OwnMean | None = None,
    ) -> Tensor:
        """As ``Predictor.logits``."""

    def pooled(self, image_CS: Image, frame: Frame, *, core: Region) -> Tensor:
        """As ``Predictor.pooled``."""


class ZoomedLogits(Logits, Protocol):
    """Who predicts a tile at any zoom."""

    def logits(
        self,
        image_CS: Image,
        frame: Frame,
        *,
        scored: Region,
        pooling: GivenMean | OwnMean | None = None,
        zoom: Zoom = NATURAL,
    ) -> Tensor:
        """As ``Predictor.logits``."""


class AveragedPredictor:
    """A predictor that is asked once for each zoom and mirror image."""

    def __init__(self, predictor: ZoomedLogits, average: Average) -> None:
        self._predictor, self._average = predictor, average

    def logits(
        self,
        image_CS: Image,
        frame: Frame,
        *,
        scored: Region,
        pooling: GivenMean | OwnMean | None = None,
    ) -> Tensor:
        """As ``Predictor.logits``: the logarithm of the mean of all probabilities.

        ``pooling`` is of the image as it is, and not to be had of the others.
        """
        import torch

        assert pooling is None, "the mean of a scene is not that of another"
        shape, size = frame.shape, image_CS.shape[1:]
        read = Region(frame.origin, tuple(a + n for a, n in zip(frame.origin, size, strict=True)))
        total_KS: Tensor | None = None
        for zoom, axes in itertools.product(self._average.zooms, self._average.mirrors):
            part = self._average.part(zoom, read, scored=scored, shape=shape)
            index = (slice(None), *part.slices(within=read))
            logits_KS = self._predictor.logits(
                _mirrored(image_CS[index], axes),
                Frame.of(part.mirrored(axes, shape=shape), shape=shape),
                scored=scored.mirrored(axes, shape=shape),
                zoom=zoom,
            ).log_softmax(dim=0)
            if axes:
                logits_KS = logits_KS.flip([1 + axis for axis in axes])
            # Not the sum of probabilities: that of a class far behind would be 0, its logarithm
            # no number.
            if total_KS is None:
                total_KS = logits_KS
            else:
                torch.logaddexp(total_KS, logits_KS, out=total_KS)
            del logits_KS  # the next pass needs the memory
        assert total_KS is not None
        return total_KS.sub_(math.log(self._average.passes))

    def pooled(self, image_CS: Image, frame: Frame, *, core: Region) -> Tensor:
        """As ``Predictor.pooled``, of the image as it is."""
        return self._predictor.pooled(image_CS, frame, core=core)


def averaged(predictor: ZoomedLogits, average: Average) -> Logits:
    """The predictor, asked as often as there are passes."""
    return predictor if average.alone else AveragedPredictor(predictor, average)


def _mirrored(image_CS: NDArray[np.float32], axes: Sequence[int]) -> NDArray[np.float32]:
    """A copy in the same order of memory, which torch takes; the image where there are no axes."""
    if not axes:
        return image_CS
    return np.flip(image_CS, tuple(1 + axis for axis in axes)).copy(order="K")
