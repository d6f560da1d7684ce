"""Which network: the ``architecture`` part of a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from pipeline.errors import BundleError

STRIDES = MappingProxyType(
    {
        ("resnet18", 2): (8, 16),
        ("resnet50", 2): (8, 16),
        ("resnet101", 2): (8, 16),
        ("slim", 2): (4, 8),
        ("slim", 3): (2, 4),
    }
)
"""Output strides, in pixels, that each trunk has in so many dimensions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A DeepLab network, but for its bands and classes."""

    family: str
    """``v3``; the other families of DeepLab are not built yet."""

    backbone: str
    """The trunk: ``resnet18``, ``resnet50``, ``resnet101`` or ``slim``."""

    dims: int
    """Number of spatial axes: 2 or 3."""

    output_stride: int
    """Pixels between neighbouring features."""

    rates: tuple[int, ...]
    """Dilations of the parallel 3x3 convolutions of ASPP, in features."""

    image_pooling: bool
    """Whether ASPP has the image-pooling branch."""

    def __post_init__(self) -> None:
        if self.family != "v3":
            raise BundleError(f"architecture family {self.family!r} asked; there is: v3")
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
