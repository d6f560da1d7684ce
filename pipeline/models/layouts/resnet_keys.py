"""Which ResNet a state dict with torchvision's names is."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from pipeline.errors import BundleError
from pipeline.models.architecture import STRIDES
from pipeline.models.layouts.layout import some

_DEPTHS = {(2, False): "resnet18", (6, True): "resnet50", (23, True): "resnet101"}
"""By the units of the third layer, and whether they narrow."""


def resnet_name(tensors: Mapping[str, Tensor], *, prefix: str, stem: str = "conv1") -> str:
    """The trunk whose names begin with ``prefix``, with a ``c`` where its stem is three 3x3.

    Raises BundleError for one that is not built here.
    """
    name = by_depth(tensors, _DEPTHS, prefix=prefix)
    name += "c" if f"{prefix}{stem}.3.weight" in tensors else ""
    if (name, 2) not in STRIDES:
        raise BundleError(f"the file's trunk is a {name}, which is not built here")
    return name


def by_depth(
    tensors: Mapping[str, Tensor], depths: Mapping[tuple[int, bool], str], *, prefix: str
) -> str:
    """The one of ``depths`` that has as many units in the third layer, narrowing or not.

    Raises BundleError where none has.
    """
    pattern = re.compile(re.escape(prefix) + r"layer3\.(\d+)\.")
    units = {int(match[1]) for key in tensors if (match := pattern.match(key))}
    narrows = f"{prefix}layer3.0.conv3.weight" in tensors
    name = depths.get((len(units), narrows))
    if name is None:
        raise BundleError(
            f"none of {', '.join(depths.values())} under {prefix or 'the top'!r} of the file:"
            f" layer3 has {len(units)} units; its names: {some(sorted(tensors))}"
        )
    return name


def size_of(tensors: Mapping[str, Tensor], key: str) -> int:
    """Length of a weight's first axis. Raises BundleError where it is missing."""
    if key not in tensors:
        raise BundleError(f"the file has no {key}; its names: {some(sorted(tensors))}")
    return len(tensors[key])
