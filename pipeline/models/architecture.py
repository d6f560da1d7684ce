"""Which network: the ``architecture`` part of a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from pipeline.errors import BundleError

STRIDES = MappingProxyType(
    {
        ("resnet18", 2): (8, 16),
        ("resnet50", 2): (8, 16),
        ("resnet101", 2): (8, 16),
        ("vgg16", 2): (8,),
        ("slim", 2): (4, 8),
        ("slim", 3): (2, 4),
    }
)
"""Output strides, in pixels, that each trunk has in so many dimensions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A DeepLab network, but for its bands and classes."""

    family: str
    """``v1``, ``v2`` or ``v3``."""

    backbone: str
    """The trunk: ``resnet18``, ``resnet50``, ``resnet101`` or ``slim``; ``vgg16`` of v1 and v2."""

    dims: int
    """Number of spatial axes: 2 or 3."""

    output_stride: int
    """Pixels between neighbouring features."""

    rates: tuple[int, ...]
    """Dilations of the parallel 3x3 convolutions of ASPP, in features; one alone is LargeFOV."""

    image_pooling: bool
    """Whether ASPP has the image-pooling branch."""

    multi_scale: Literal["features", "inputs"] | None = None
    """``features``: v1 with the scores of the image and the first pools added (its MSc).
    ``inputs``: v2 on the image at scales 1, 3/4 and 1/2, of which the greatest score counts."""

    def __post_init__(self) -> None:
        check = _FAMILIES.get(self.family)
        if check is None:
            raise BundleError(
                f"architecture family {self.family!r} asked; there is: {', '.join(_FAMILIES)}"
            )
        strides = STRIDES.get((self.backbone, self.dims))
        if strides is None:
            known = ", ".join(f"{name} ({dims}-D)" for name, dims in STRIDES)
            raise BundleError(f"no {self.dims}-D backbone {self.backbone!r}; there are: {known}")
        if self.output_stride not in strides:
            raise BundleError(
                f"output stride {self.output_stride} asked of {self.backbone} in {self.dims}-D;"
                f" it has {' and '.join(map(str, strides))}"
            )
        if not self.rates or min(self.rates) < 1:
            raise BundleError(f"rates must be positive dilations, got {list(self.rates)}")
        check(self)


def _check_v1(asked: Architecture) -> None:
    if len(asked.rates) != 1:
        raise BundleError(f"family v1 has one rate, 12 as published; got {list(asked.rates)}")
    _check_summed(asked, backbones=("vgg16",), multi_scale="features")


def _check_v2(asked: Architecture) -> None:
    _check_summed(asked, backbones=("vgg16", "resnet101"), multi_scale="inputs")


def _check_summed(asked: Architecture, *, backbones: tuple[str, ...], multi_scale: str) -> None:
    """What v1 and v2 have in common: stride 8, and scores where v3 has an image pooling."""
    family = asked.family
    if asked.backbone not in backbones:
        raise BundleError(
            f"family {family} has no backbone {asked.backbone!r}; it has: {', '.join(backbones)}"
        )
    if asked.output_stride != 8:
        raise BundleError(f"family {family} has output stride 8, got {asked.output_stride}")
    if asked.image_pooling:
        raise BundleError(f"family {family} has no image pooling: set image_pooling to false")
    if asked.multi_scale not in (None, multi_scale):
        raise BundleError(
            f"multi_scale of family {family} is {multi_scale!r} or absent,"
            f" got {asked.multi_scale!r}"
        )


def _check_v3(asked: Architecture) -> None:
    if asked.backbone == "vgg16":
        raise BundleError("backbone 'vgg16' is of families v1 and v2, not of v3")
    if asked.multi_scale is not None:
        raise BundleError(f"multi_scale {asked.multi_scale!r} is of families v1 and v2, not of v3")


_FAMILIES: MappingProxyType[str, Callable[[Architecture], None]] = MappingProxyType(
    {"v1": _check_v1, "v2": _check_v2, "v3": _check_v3}
)
"""The families, each with what it asks of its fields."""
