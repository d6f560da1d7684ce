"""The networks of the papers and of torchvision, by family and trunk."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from pipeline.models.architecture import STRIDES, Architecture, Decoder

_SUMMED_RATES = MappingProxyType({"v1": (12,), "v2": (6, 12, 18, 24)})
"""Of the families whose branches give scores."""


def published(
    family: str, backbone: str, *, dims: int = 2, output_stride: int | None = None
) -> Architecture:
    """The architecture that goes with a trunk; ``output_stride`` None: the trunk's finest.

    torchvision's trunks come with its v3, those ending in ``c`` with OpenMMLab's heads, all others
    with their authors'. An FCN has nothing but its trunk to choose. The slim trunk has rates that
    keep its halo small. v1 is LargeFOV, v2 has the wider of its two pyramids, ASPP-L.

    Raises:
        BundleError: there is no such family or trunk, or it has no such output stride.
    """
    if family in _SUMMED_RATES:
        return Architecture(
            family=family,
            backbone=backbone,
            dims=dims,
            output_stride=output_stride or 8,
            rates=_SUMMED_RATES[family],
            image_pooling=False,
            align_corners=True,
        )
    finest, *_ = STRIDES.get((backbone, dims), (8,))
    made = Architecture(
        family="v3",
        backbone=backbone,
        dims=dims,
        output_stride=finest,
        rates=(12, 24, 36),
        image_pooling=True,
    )
    if backbone.startswith("medicalnet"):  # rates for crops of about 100 voxels
        made = replace(made, rates=(2, 4, 6))
    elif backbone == "slim":
        stride = output_stride or finest
        rates = (2, 4, 6) if stride == finest else (1, 2)
        made = replace(made, output_stride=stride, rates=rates, image_pooling=False)
    elif backbone.endswith("c"):
        made = replace(made, width=512, projection=3)
    elif backbone.endswith(("-tf", "-beta")):
        made = replace(made, multi_grid=(1, 2, 4), align_corners=True)
    elif backbone.startswith("xception"):
        made = replace(made, separable="normed", align_corners=True)
    if family == "fcn":
        return replace(
            made,
            family=family,
            output_stride=output_stride or finest,
            rates=(),
            image_pooling=False,
        )
    if family != "v3":
        made = _with_decoder(made, family)
    return made.at_stride(output_stride or finest)


def _with_decoder(encoder: Architecture, family: str) -> Architecture:
    """Two 3x3 convolutions, separable where the trunk's authors or OpenMMLab have them so."""
    if encoder.backbone == "slim":
        return replace(encoder, family=family, decoder=Decoder(low=16, widths=(32,)))
    width = encoder.width or 256
    plain = encoder.smooth or encoder.dims == 3  # torchvision's trunks, and volumes
    return replace(
        encoder,
        family=family,
        separable=None if plain else "normed",
        decoder=Decoder(low=48, widths=(width, width)),
    )
