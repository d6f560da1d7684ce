"""The first convolution for other bands than the weights were trained on.

A band that they know keeps its filters, a new one gets the mean over the bands that they know, and
all are scaled by (bands known) / (bands asked): an image that is alike in all bands is answered as
before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.models.input_spec import SCALING_KEYS, Scaling


def filters_for(weight_OCS: Tensor, *, known: Sequence[str], asked: Sequence[str]) -> Tensor:
    """The (outputs, bands asked, *S) kernels for those of the bands ``known``; a new array."""
    mean_O1S = weight_OCS.mean(1, keepdim=True)
    parts = [
        weight_OCS[:, known.index(band), None] if band in known else mean_O1S for band in asked
    ]
    return torch.cat(parts, dim=1) * (len(known) / len(asked))


def scaling_for(scaling: Scaling, *, known: Sequence[str], asked: Sequence[str]) -> Scaling:
    """The scaling for the bands ``asked``: a new one has the mean of each parameter."""
    changes: dict[str, Any] = {}
    for key in SCALING_KEYS[scaling.type]:
        values: tuple[float, ...] = getattr(scaling, key)
        if len(values) > 1:
            mean = sum(values) / len(values)
            changes[key] = tuple(
                values[known.index(band)] if band in known else mean for band in asked
            )
    return replace(scaling, **changes)
