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
        ("medicalnet10", 3): (8,),
        ("medicalnet18", 3): (8,),
        ("medicalnet34", 3): (8,),
        ("medicalnet50", 3): (8,),
        ("slim", 2): (4, 8),
        ("slim", 3): (2, 4),
    }
)
"""Output strides, in pixels, that each trunk has in so many dimensions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A DeepLab network, but for its bands and classes."""

    family: str
    """``v3``, or ``fcn``: torchvision's head of one 3x3 convolution (Long et al. 2015), as a
    baseline."""

    backbone: str
    """The trunk: ``resnet18``, ``resnet50``, ``resnet101`` or ``slim``."""

    dims: int
    """Number of spatial axes: 2 or 3."""

    output_stride: int
    """Pixels between neighbouring features."""

    rates: tuple[int, ...] = ()
    """Dilations of the parallel 3x3 convolutions of ASPP, in features; none of an FCN."""

    image_pooling: bool
    """Whether ASPP has the image-pooling branch."""

    slice_stride: int | None = None
    """Voxels between neighbouring features along z, for thick slices: 2 where they are 5 mm, and
    voxels 1 mm along y and x, brings features 10 mm and 8 mm apart, so that one rate serves all
    axes. None: the output stride. MedicalNet's trunks alone have it."""

    def __post_init__(self) -> None:
        if self.family not in ("v3", "fcn"):
            raise BundleError(f"architecture family {self.family!r} asked; there is: v3, fcn")
        if self.family == "fcn" and (self.dims == 3 or self.rates or self.image_pooling):
            raise BundleError("family fcn has 2-D trunks, rates [], and no image_pooling")
        strides = STRIDES.get((self.backbone, self.dims))
        if strides is None:
            known = ", ".join(f"{name} ({dims}-D)" for name, dims in STRIDES)
            raise BundleError(f"no {self.dims}-D backbone {self.backbone!r}; there are: {known}")
        if self.output_stride not in strides:
            raise BundleError(
                f"output stride {self.output_stride} asked of {self.backbone} in {self.dims}-D;"
                f" it has {' and '.join(map(str, strides))}"
            )
        if self.family == "v3" and (not self.rates or min(self.rates) < 1):
            raise BundleError(f"rates must be positive dilations, got {list(self.rates)}")
        if self.slice_stride is not None and (
            not self.backbone.startswith("medicalnet") or self.slice_stride not in (1, 2, 4, 8)
        ):
            raise BundleError(
                f"slice_stride {self.slice_stride} asked of {self.backbone}: the medicalnet trunks"
                " have it, 1, 2, 4 or 8"
            )

    @property
    def steps(self) -> tuple[int, ...]:
        """Pixels between neighbouring features, per axis."""
        sides = (self.output_stride,) * self.dims
        return sides if self.slice_stride is None else (self.slice_stride, *sides[1:])
