"""From pixel values to network input, pixel by pixel: no statistics of the tile enter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.models.input_spec import Scaling
from pipeline.ports import Block


class Image(Protocol):
    """(C, *S) float32, as the network wants it: an array, or what makes parts of one when asked."""

    @property
    def shape(self) -> Sequence[int]:
        """(C, *S)."""

    def __getitem__(self, index: tuple[slice, ...], /) -> NDArray[np.float32]:
        """A part, with all channels; may alias."""


@dataclass(frozen=True, slots=True)
class Normalised:
    """A block as ``normalise`` gives it, made part by part: of integers a half of its memory."""

    block: Block
    scaling: Scaling

    @property
    def shape(self) -> Sequence[int]:
        """As ``Image.shape``."""
        return self.block.image_CS.shape

    def __getitem__(self, index: tuple[slice, ...], /) -> NDArray[np.float32]:
        """As ``Image``; a new array. Raises SourceError."""
        part = Block(self.block.image_CS[index], self.block.valid_S[index[1:]])
        return normalise(part, self.scaling)


def normalise(block: Block, scaling: Scaling) -> NDArray[np.float32]:
    """Scale a block; pixels that are invalid, and values that are not finite, become 0.

    Returns:
        (C, *S) float32, finite; a new array, in memory a pixel's channels side by side, as the
        network wants them.

    Raises:
        SourceError: the block has no real numbers, or another number of bands than the scaling.
    """
    image_CS = block.image_CS
    if image_CS.dtype.kind not in "buif":
        raise SourceError(f"pixels of type {image_CS.dtype} asked of a network; give real numbers")
    # Halves and small integers are exact in float32; others keep their own precision until scaled.
    precision = np.result_type(image_CS.dtype, np.float32)
    scaled_CS = np.moveaxis(np.empty((*image_CS.shape[1:], len(image_CS)), np.float32), -1, 0)
    with np.errstate(over="ignore", invalid="ignore"):
        for band, (first, second) in enumerate(scaling.pairs(len(image_CS))):
            values_S = image_CS[band].astype(precision)
            _scale(values_S, scaling, first=first, second=second)
            scaled_S = values_S.astype(np.float32, copy=False)
            scaled_S[~(np.isfinite(scaled_S) & block.valid_S)] = 0.0
            scaled_CS[band] = scaled_S
    return scaled_CS


def _scale(values: NDArray[np.floating], scaling: Scaling, *, first: float, second: float) -> None:
    """Scale one band in place."""
    match scaling.type:
        case "z-score":
            values -= first
            values /= second
        case "min-max":
            values -= first
            values /= second - first
        case "offset-scale":
            values *= second
            values += first
        case "clip":
            np.clip(values, first, second, out=values)
