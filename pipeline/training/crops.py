"""Where training looks: random crops, centred on every class equally often.

Axes in array names: B batch, C channel, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.domain import Shape
from pipeline.errors import SourceError


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """An image and the class of each of its pixels."""

    image_CS: NDArray[np.float32]
    """(C, *S) float32, normalised; 0 where invalid."""

    label_S: NDArray[np.uint8]
    """(*S) uint8 class indices 0..K-1, or the ignored value."""

    def __post_init__(self) -> None:
        if self.image_CS.shape[1:] != self.label_S.shape:
            raise SourceError(
                f"an image of {self.image_CS.shape[1:]} px has labels of {self.label_S.shape} px:"
                " give both on one grid"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CropSpec:
    """How crops are cut."""

    crop: Shape
    """Side per axis, in pixels."""

    batch: int
    """Crops per step."""

    flips: tuple[int, ...]
    """Spatial axes along which the content has no direction; each is flipped half the time."""

    ignore_index: int
    """Label that no crop is centred on."""


class CropSampler:
    """Draws batches of crops; every class present is the centre of one equally often.

    A class that covers little of a scene would otherwise hardly be seen.
    """

    def __init__(self, samples: Sequence[Sample], *, spec: CropSpec) -> None:
        """Index the labels of ``samples``; the arrays are referred to, not copied.

        Raises:
            SourceError: Where a sample is smaller than the crop, or no pixel has a label.
        """
        for sample in samples:
            if any(n < c for n, c in zip(sample.label_S.shape, spec.crop, strict=True)):
                raise SourceError(
                    f"a crop of {spec.crop} px was asked of a sample of {sample.label_S.shape} px:"
                    " take a smaller crop"
                )
        self.samples = tuple(samples)
        self.spec = spec
        self._ends = np.cumsum([s.label_S.size for s in samples])
        labels = np.concatenate([s.label_S.ravel() for s in samples]) if samples else np.empty(0)
        present = [value for value in np.unique(labels) if value != spec.ignore_index]
        if not present:
            raise SourceError(
                f"no pixel of {len(samples)} samples has a label other than {spec.ignore_index}:"
                " nothing can be learned"
            )
        self._places = [np.flatnonzero(labels == value) for value in present]

    def draw(self, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """A batch: images (B, C, *S) float32 and labels (B, *S) uint8; new arrays."""
        crops = [self._crop(rng) for _ in range(self.spec.batch)]
        return np.stack([image for image, _ in crops]), np.stack([label for _, label in crops])

    def _crop(self, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        places = self._places[rng.integers(len(self._places))]
        place = int(places[rng.integers(len(places))])
        number = int(np.searchsorted(self._ends, place, side="right"))
        sample = self.samples[number]
        shape = sample.label_S.shape
        centre = np.unravel_index(place - int(self._ends[number]) + sample.label_S.size, shape)
        box = []
        for at, side, length in zip(centre, self.spec.crop, shape, strict=True):
            # The labelled pixel lies anywhere in the crop, or it would always see the same context.
            start = min(max(int(at) - int(rng.integers(side)), 0), length - side)
            box.append(slice(start, start + side))
        flips = tuple(axis for axis in self.spec.flips if rng.random() < 0.5)
        image = np.flip(sample.image_CS[(slice(None), *box)], tuple(axis + 1 for axis in flips))
        return image, np.flip(sample.label_S[tuple(box)], flips)
