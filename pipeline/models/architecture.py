"""Which network: the ``architecture`` part of a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Literal

from pipeline.errors import BundleError

STRIDES = MappingProxyType(
    {
        ("resnet18", 2): (8, 16),
        ("resnet50", 2): (8, 16),
        ("resnet101", 2): (8, 16),
        ("resnet50c", 2): (8, 16),
        ("resnet101c", 2): (8, 16),
        ("resnet50-tf", 2): (8, 16),
        ("resnet101-tf", 2): (8, 16),
        ("resnet50-beta", 2): (8, 16),
        ("resnet101-beta", 2): (8, 16),
        ("xception41", 2): (8, 16),
        ("xception65", 2): (8, 16),
        ("xception71", 2): (8, 16),
        ("mobilenetv3-large", 2): (16,),
        ("vgg16", 2): (8,),
        ("medicalnet10", 3): (8,),
        ("medicalnet18", 3): (8,),
        ("medicalnet34", 3): (8,),
        ("medicalnet50", 3): (8,),
        ("slim", 2): (4, 8),
        ("slim", 3): (2, 4),
    }
)
"""Output strides, in pixels, that each trunk has in so many dimensions."""

Separable = Literal["bare", "normed"]
"""How a 3x3 convolution is split in two. ``bare``: depthwise, pointwise, then norm and ReLU.
``normed``: norm and ReLU after each of the two, as in the release of v3+."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """What brings v3+ to the stride of its low-level features (Chen et al. 2018, section 3.1)."""

    low: int
    """Channels that the low-level features are reduced to; 48 as published."""

    widths: tuple[int, ...]
    """Channels of each 3x3 convolution over both, the encoder's features first; [256, 256] as
    published."""

    def __post_init__(self) -> None:
        if not self.widths or min(self.low, *self.widths) < 1:
            raise BundleError(
                f"a decoder needs positive widths, got low {self.low} and {list(self.widths)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A DeepLab network, but for its bands and classes."""

    family: str
    """``v1``, ``v2``, ``v3`` or ``v3plus``; ``fcn`` is torchvision's baseline, one 3x3 convolution
    on its dilated trunks (after Long et al. 2015)."""

    backbone: str
    """The trunk, one of ``STRIDES``.

    ``resnet*`` are torchvision's; with ``c``, three 3x3 convolutions of 32, 32 and 64 channels are
    in place of the first 7x7. ``-tf`` and ``-beta`` have their strides in the last unit of a block,
    as the authors' release; ``-beta`` starts with three 3x3 of 64, 64 and 128. Family v1 has
    ``vgg16``, and v2 that or ``resnet101`` with its strides as first released.
    """

    dims: int
    """Number of spatial axes: 2 or 3."""

    output_stride: int
    """Pixels between neighbouring features of the encoder."""

    rates: tuple[int, ...]
    """Dilations of the parallel 3x3 convolutions of ASPP, in features; none with a cascade. One
    alone is the LargeFOV of v1 and v2."""

    image_pooling: bool
    """Whether ASPP has the image-pooling branch."""

    align_corners: bool = False
    """Whether linear interpolation keeps the first and the last element where they are. Sides of
    the padded scene then are ``k * output_stride + 1`` px."""

    multi_grid: tuple[int, ...] = ()
    """Factors of the dilations in the trunk's last block, one per unit (Chen et al. 2017, section
    3.2.1); of Xception's last unit, one per convolution. None: all 1."""

    dilate_first: bool = False
    """Whether the convolution that gave up its stride is dilated as those after it are. It is not
    in the authors' networks, where it still reads what the strided one read."""

    cascade: int = 0
    """Copies of the trunk's last block that follow it, in place of ASPP (section 3.2)."""

    width: int | None = None
    """Channels of every branch of ASPP and of their projection. None: 256; of ``slim``, its own."""

    projection: int = 1
    """Kernel side of the convolution that brings the branches of ASPP together."""

    separable: Separable | None = None
    """How the 3x3 convolutions of ASPP and decoder are split; None: not at all."""

    smoothing: bool | None = None
    """Whether a 3x3 convolution follows ASPP. None: where torchvision has one, that is, under the
    v3 heads of its own trunks."""

    decoder: Decoder | None = None
    """The decoder of v3+; no other family has one."""

    multi_scale: Literal["features", "inputs"] | None = None
    """``features``: v1 with the scores of the image and the first pools added (its MSc).
    ``inputs``: v2 on the image at scales 1, 3/4 and 1/2, of which the greatest score counts."""

    slice_stride: int | None = None
    """Voxels between neighbouring features along z, for thick slices: 2 where they are 5 mm, and
    voxels 1 mm along y and x, brings features 10 mm and 8 mm apart. None: the output stride."""

    slice_ratio: float | None = None
    """By how much voxels lie further apart along z than along y and x: 5 for slices of 5 mm and
    pixels of 1 mm. Dilations along z, in trunk and ASPP, are then as many times smaller as features
    lie further apart (``dilation``). None: as published, one dilation for all axes."""

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
        check(self)
        if self.slice_stride is not None or self.slice_ratio is not None:
            _check_slices(self)

    @property
    def steps(self) -> tuple[int, ...]:
        """Pixels between neighbouring features of the encoder, per axis."""
        sides = (self.output_stride,) * self.dims
        return sides if self.slice_stride is None else (self.slice_stride, *sides[1:])

    def dilation(self, rate: int) -> tuple[int, ...]:
        """A dilation per axis, in features, that reaches as far along z as ``rate`` does elsewhere.

        Rounded, and at least 1.
        """
        rates = (rate,) * self.dims
        if self.slice_ratio is None:
            return rates
        apart = self.slice_ratio * self.steps[0] / self.output_stride
        return (max(1, int(rate / apart + 0.5)), *rates[1:])

    @property
    def smooth(self) -> bool:
        """Whether a 3x3 convolution follows ASPP."""
        if self.smoothing is not None:
            return self.smoothing
        return self.family == "v3" and self.backbone in TORCHVISION

    @property
    def squeezes(self) -> bool:
        """Whether the trunk takes means over all that is read, so that no halo is exact."""
        return self.backbone == "mobilenetv3-large"

    @property
    def pools(self) -> bool:
        """Whether there is a mean that the context is about."""
        return self.image_pooling or self.squeezes

    @property
    def windowed(self) -> bool:
        """Whether all its means can be over windows, so that tiles agree."""
        return self.image_pooling and not self.squeezes

    def at_stride(self, stride: int) -> Architecture:
        """The same weights at another output stride: rates keep their reach in pixels.

        So they double from 16 to 8 (Chen et al. 2017, section 3.3). Raises BundleError where the
        trunk has other layers there, or rates are odd.
        """
        if self.backbone == "slim" and stride != self.output_stride:
            raise BundleError(
                f"the slim trunk has other layers at stride {stride} than at {self.output_stride}:"
                " make a new bundle"
            )
        rates = [rate * self.output_stride for rate in self.rates]
        if any(rate % stride for rate in rates):
            raise BundleError(
                f"rates {list(self.rates)} at output stride {self.output_stride} have no whole"
                f" counterparts at {stride}"
            )
        return replace(self, output_stride=stride, rates=tuple(rate // stride for rate in rates))


TORCHVISION = ("resnet18", "resnet50", "resnet101", "mobilenetv3-large")
"""Trunks that torchvision has under a DeepLab head, or could have."""

_UNITS = MappingProxyType({"resnet18": 2, "mobilenetv3-large": 0, "slim": 0})
"""Convolutions that ``multi_grid`` tells apart, where they are not three."""


def _check_v1(asked: Architecture) -> None:
    if len(asked.rates) != 1:
        raise BundleError(f"family v1 has one rate, 12 as published; got {list(asked.rates)}")
    _check_summed(asked, backbones=("vgg16",), multi_scale="features")


def _check_v2(asked: Architecture) -> None:
    _check_summed(asked, backbones=("vgg16", "resnet101"), multi_scale="inputs")


_TRUNK = {"family", "backbone", "dims", "output_stride"}
"""What may vary in an FCN."""

_SUMMED = {"family", "backbone", "dims", "rates", "multi_scale"}
"""What may vary in v1 and v2."""


def _check_summed(asked: Architecture, *, backbones: tuple[str, ...], multi_scale: str) -> None:
    """What v1 and v2 have in common: stride 8, corners aligned, and no image pooling."""
    family = asked.family
    if asked.backbone not in backbones:
        raise BundleError(
            f"family {family} has no backbone {asked.backbone!r}; it has: {', '.join(backbones)}"
        )
    if asked.multi_scale not in (None, multi_scale):
        raise BundleError(
            f"multi_scale of family {family} is {multi_scale!r} or absent,"
            f" got {asked.multi_scale!r}"
        )
    if not asked.rates or min(asked.rates) < 1:
        raise BundleError(f"rates must be positive dilations, got {list(asked.rates)}")
    fixed = {f.name: f.default for f in fields(Architecture) if f.name not in _SUMMED}
    fixed |= {"output_stride": 8, "image_pooling": False, "align_corners": True}
    for name, value in fixed.items():
        if getattr(asked, name) != value:
            raise BundleError(
                f"family {family} has {name} {value} and no other, got {getattr(asked, name)}"
            )


def _check_v3(asked: Architecture) -> None:
    if asked.decoder is not None:
        raise BundleError("family v3 has no decoder: that is v3plus")
    _check_head(asked)


def _check_v3plus(asked: Architecture) -> None:
    if asked.decoder is None:
        raise BundleError("family v3plus needs a decoder, such as {low: 48, widths: [256, 256]}")
    if asked.cascade:
        raise BundleError(f"cascade {asked.cascade} is of family v3: v3plus has ASPP")
    _check_head(asked)


def _check_head(asked: Architecture) -> None:
    """What v3 and v3+ have in common: trunk, cascade and ASPP."""
    if asked.backbone == "vgg16" or asked.multi_scale is not None:
        raise BundleError(
            f"family {asked.family} has neither backbone vgg16 nor multi_scale: they are of v1 and"
            f" v2; got {asked.backbone} and {asked.multi_scale}"
        )
    units = 0 if _is_medicalnet(asked) else _UNITS.get(asked.backbone, 3)
    if asked.multi_grid and (len(asked.multi_grid) != units or min(asked.multi_grid) < 1):
        raise BundleError(
            f"multi_grid of {asked.backbone} takes {units} positive factors,"
            f" got {list(asked.multi_grid)}"
        )
    if asked.cascade:
        if asked.cascade < 0 or not asked.backbone.endswith(("-tf", "-beta")):
            raise BundleError(
                f"cascade {asked.cascade} asked of {asked.backbone}: copies of the last block"
                " follow the trunks -tf and -beta alone"
            )
        if asked.rates or asked.image_pooling:
            raise BundleError("a cascade stands in place of ASPP: rates [], image_pooling false")
    elif not asked.rates or min(asked.rates) < 1:
        raise BundleError(f"rates must be positive dilations, got {list(asked.rates)}")
    if asked.projection not in (1, 3) or (asked.width is not None and asked.width < 1):
        raise BundleError(
            f"ASPP takes a projection of kernel 1 or 3 and a positive width, got"
            f" {asked.projection} and {asked.width}"
        )


def _check_fcn(asked: Architecture) -> None:
    if asked.backbone not in TORCHVISION or asked.squeezes:
        raise BundleError(f"family fcn has torchvision's ResNets, got {asked.backbone}")
    fixed = {f.name: f.default for f in fields(Architecture) if f.name not in _TRUNK}
    for name, value in (fixed | {"rates": (), "image_pooling": False}).items():
        if getattr(asked, name) != value:
            raise BundleError(f"family fcn has {name} {value}, got {getattr(asked, name)}")


def _is_medicalnet(asked: Architecture) -> bool:
    return asked.backbone.startswith("medicalnet")


def _check_slices(asked: Architecture) -> None:
    stride, ratio = asked.slice_stride, asked.slice_ratio
    if asked.dims != 3:
        raise BundleError(
            f"slice_stride {stride} and slice_ratio {ratio} asked in {asked.dims}-D: volumes have"
            " slices"
        )
    known = [step for step in (1, 2, 4, 8) if step <= asked.output_stride]
    if stride is not None and stride not in known:
        raise BundleError(
            f"slice_stride {stride} asked of {asked.backbone} at output stride"
            f" {asked.output_stride}; there is: {', '.join(map(str, known))}"
        )
    if ratio is not None and not 0.01 <= ratio <= 100:
        raise BundleError(
            f"slice_ratio {ratio} asked: it is the distance of slices over that of pixels, between"
            " 0.01 and 100"
        )


_FAMILIES: MappingProxyType[str, Callable[[Architecture], None]] = MappingProxyType(
    {"v1": _check_v1, "v2": _check_v2, "v3": _check_v3, "v3plus": _check_v3plus, "fcn": _check_fcn}
)
"""The families, each with what it asks of its fields."""
