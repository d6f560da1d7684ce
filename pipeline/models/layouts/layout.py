"""What a layout is, and how weights are brought from it: every name accounted for, or none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import BundleError
from pipeline.models.architecture import Architecture
from pipeline.models.input_spec import ClassInfo, Scaling

IMAGENET = Scaling(type="z-score", mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
"""ImageNet's mean and deviation of red, green and blue, for values of 0 to 255."""

UNIT_RANGE = Scaling(type="z-score", mean=(127.5,), std=(127.5,))
"""0 to 255 becomes -1 to 1, as TensorFlow's networks take it."""

_COUNTER = "num_batches_tracked"
"""Of a batch norm in training; many files leave it out."""


class Layout(ABC):
    """How somebody names the weights of a DeepLab, and what they were trained on."""

    bands: tuple[str, ...] = ("red", "green", "blue")
    """Names and order of the bands that the network was trained on."""

    dtype: str = "uint8"
    """numpy dtype of the pixel values."""

    crop: tuple[int, ...] = (513, 513)
    """Training window, in px."""

    ignored: tuple[str, ...] = ()
    """Patterns of names that training alone needs, such as of an auxiliary classifier."""

    named_by_count: bool = False
    """Whether 21 and 19 classes are those of VOC 2012 and Cityscapes, as in published files."""

    note: str | None = None
    """How the network runs here otherwise than there, for the bundle."""

    @abstractmethod
    def architecture(self, tensors: Mapping[str, Tensor]) -> Architecture:
        """What the names and shapes tell, at the output stride of published files.

        Raises BundleError for a network that is not built here.
        """

    @abstractmethod
    def modules(
        self, architecture: Architecture, tensors: Mapping[str, Tensor]
    ) -> Mapping[str, str]:
        """Their name of a module, or of all within it, by our name; the longest of ours counts.

        A network of which they have the trunk alone has no name for its ``classifier``.
        """

    def scaling(self, architecture: Architecture) -> Scaling:
        """How pixel values of 0 to 255 become the network's input."""
        return IMAGENET

    def classes(self, beside: Mapping[str, Any]) -> tuple[ClassInfo, ...] | None:
        """The classes that a file says it has."""
        return None

    def ignores(self, key: str, architecture: Architecture) -> bool:
        """Whether a weight of theirs has no place in the network."""
        return any(fnmatchcase(key, pattern) for pattern in self.ignored)

    def begun(
        self, fresh: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """What else of a fresh head begins from the file, by our names."""
        return {}

    def at_stride(self, architecture: Architecture, stride: int) -> Architecture:
        """The network at the output stride that it was trained at, where that is another."""
        return architecture.at_stride(stride)

    def key(self, module: nn.Module, name: str, parameter: str) -> str:
        """Their name of a weight, within the module that they call ``name``."""
        return f"{name}.{parameter}" if name else parameter

    def brought(self, weight: Tensor, module: nn.Module) -> Tensor:
        """A weight with its axes in our order; a view of it."""
        return weight

    def moved(self, architecture: Architecture) -> Mapping[str, int]:
        """Convolutions that read joined features in another order there, by our names.

        So many of their first input channels are our last ones.
        """
        return {}


def their_name(ours: str, modules: Mapping[str, str]) -> str | None:
    """Their name of a module of ours; None for one that they do not have."""
    parts = ours.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in modules:
            rest = parts[length:]
            return ".".join(filter(None, (modules[prefix], *rest)))
    return None


def bring(
    layout: Layout, tensors: Mapping[str, Tensor], *, network: nn.Module, architecture: Architecture
) -> dict[str, Tensor]:
    """The weights of ``network`` that are in the file, by our names, in the dtypes of ours.

    Args:
        layout: how the file names them.
        tensors: by their names.
        network: ours, of ``architecture``; its values do not matter, and may be without memory.
        architecture: the network's.

    Raises:
        BundleError: names of weights that are missing in the file, unknown in it, or of another
            shape.
    """
    modules, moved = layout.modules(architecture, tensors), layout.moved(architecture)
    found: dict[str, Tensor] = {}
    used, missing, unlike = set(), [], []
    for ours, wanted in network.state_dict().items():
        owner, _, parameter = ours.rpartition(".")
        theirs, module = their_name(owner, modules), network.get_submodule(owner)
        if theirs is None:
            continue
        key = layout.key(module, theirs, parameter)
        used.add(key)
        if key in tensors:
            weight = layout.brought(tensors[key], module)
        elif parameter == _COUNTER:
            weight = torch.zeros(())
        else:
            missing.append(key)
            continue
        if parameter == "weight" and owner in moved:
            weight = weight.roll(-moved[owner], dims=1)
        if weight.shape != wanted.shape:
            unlike.append(f"{key} is {list(weight.shape)}, not {list(wanted.shape)}")
        found[ours] = weight.to(wanted.dtype, copy=True).contiguous()
    unknown = [k for k in tensors if k not in used and not layout.ignores(k, architecture)]
    _refuse({"misses": missing, "has unknown": unknown, "has unlike": unlike}, architecture)
    return found


def _refuse(faults: Mapping[str, list[str]], architecture: Architecture) -> None:
    said = "; ".join(f"{what} weights {some(names)}" for what, names in faults.items() if names)
    if said:
        raise BundleError(
            f"the file is no {architecture.family} on {architecture.backbone} of this layout:"
            f" it {said}"
        )


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - 4
    return ", ".join(names[:4]) + (f" and {rest} more" if rest > 0 else "")
