"""DeepLab v3 and v3+: a trunk, atrous spatial pyramid pooling, a decoder, and linear upsampling.

Chen et al. 2017 (arXiv 1706.05587) and 2018 (1802.02611). v3 on torchvision's trunks has its
layout, key for key.
Axes in array names: B batch, C channel, K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Self

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.models.architecture import Architecture
from pipeline.models.aspp import Aspp
from pipeline.models.blocks import classify, conv_norm_relu, mix
from pipeline.models.context_pool import ContextPool, window_features
from pipeline.models.deeplab_v1 import DeepLabV1
from pipeline.models.deeplab_v2 import DeepLabV2
from pipeline.models.frame import Frame
from pipeline.models.geometry import per_axis
from pipeline.models.network import DeepLab
from pipeline.models.resize import Resize
from pipeline.models.slim import SLIM_WIDTH
from pipeline.models.trunks import Trunk, build_trunk
from pipeline.models.unfilled import Unfilled

__all__ = [
    "DecoderHead",
    "DeepLab",
    "DeepLabV3",
    "Head",
    "aspp_width",
    "build_network",
    "network_of_file",
]


class Head(nn.Sequential):
    """ASPP, unless a cascade or an FCN's layer stands in its place, and what follows there."""

    def forward(self, features_BCS: Tensor, frame: Frame) -> Tensor:  # type: ignore[override]
        """Return (B, C, *S) features of the last layer: logits, where that is a classifier."""
        for layer in self:
            features_BCS = (
                layer(features_BCS, frame) if isinstance(layer, Aspp) else layer(features_BCS)
            )
        return features_BCS


class DecoderHead(nn.Sequential):
    """ASPP, and the decoder of v3+, which brings it to its low-level features (2018, Fig. 2)."""

    def __init__(
        self, architecture: Architecture, *, encoder: Head, trunk: Trunk, classes: int
    ) -> None:
        dims, decoder = architecture.dims, architecture.decoder
        assert decoder is not None
        lows = per_axis(trunk.low_stride, dims)
        factors = tuple(a // b for a, b in zip(architecture.steps, lows, strict=True))
        low = conv_norm_relu(dims, trunk.low_channels, decoder.low, kernel=1)
        fuse: list[nn.Module] = []
        inputs = aspp_width(architecture) + decoder.low
        for width in decoder.widths:
            fuse += mix(dims, inputs, width, separable=architecture.separable)
            inputs = width
        layers: dict[str, nn.Module] = {
            "encoder": encoder,
            "resize": Resize(factors, (1,) * dims, align_corners=architecture.align_corners),
            "low": nn.Sequential(*low),
            "fuse": nn.Sequential(*fuse),
            "classify": classify(dims, inputs, classes),
        }
        super().__init__(OrderedDict(layers))

    def forward(  # type: ignore[override]
        self, low_BCS: Tensor, features_BCS: Tensor, frame: Frame
    ) -> Tensor:
        """Return (B, K, *S) logits at the stride of the low-level features."""
        encoder, resize, low, fuse, last = self
        joined_BCS = torch.cat([resize(encoder(features_BCS, frame)), low(low_BCS)], dim=1)
        logits_BKS: Tensor = last(fuse(joined_BCS))
        return logits_BKS


def aspp_width(architecture: Architecture) -> int:
    """Channels of every branch of ASPP, and so of the mean of image pooling."""
    if architecture.width is not None:
        return architecture.width
    return SLIM_WIDTH[architecture.dims] if architecture.backbone == "slim" else 256


class DeepLabV3(DeepLab):
    """DeepLab v3, with a decoder v3+, and with neither ASPP nor decoder an FCN."""

    def __init__(self, architecture: Architecture, *, bands: int, classes: int) -> None:
        super().__init__(architecture, bands=bands, classes=classes)
        dims = architecture.dims
        self.stride = architecture.output_stride
        self.backbone = build_trunk(architecture, bands=bands)
        head, width = _encoder(architecture, inputs=self.backbone.channels)
        self.classifier: Head | DecoderHead
        if architecture.decoder is None:
            self.classifier = head.append(classify(dims, width, classes))
            steps = architecture.steps
        else:
            self.classifier = DecoderHead(
                architecture, encoder=head, trunk=self.backbone, classes=classes
            )
            steps = per_axis(self.backbone.low_stride, dims)
        self.upsample = Resize(steps, (1,) * dims, align_corners=self.align_corners)

    def coarse_logits(self, image_BCS: Tensor, frame: Frame) -> Tensor:
        """Return (B, K, *S) logits at the output stride, or at that of the decoder."""
        logits_BKS: Tensor
        if isinstance(self.classifier, Head):
            logits_BKS = self.classifier(self.backbone(image_BCS), frame)
        else:
            low_BCS, features_BCS = self.backbone.taps(image_BCS)
            logits_BKS = self.classifier(low_BCS, features_BCS, frame)
        return logits_BKS

    @property
    def last_layers(self) -> tuple[nn.Module, ...]:
        """As ``DeepLab.last_layers``."""
        return (self.classifier[-1],)

    @property
    def pool(self) -> ContextPool | None:
        """The image-pooling branch; None for a network without one."""
        return next((part for part in self.modules() if isinstance(part, ContextPool)), None)

    def pool_over(self, crop: Sequence[int] | None) -> Self:
        """Pool over windows of the training crop, in px; over all that is read where None."""
        if self.pool is not None:
            window = None if crop is None else window_features(crop, steps=self.architecture.steps)
            self.pool.mean.window = window
        return self


def _encoder(architecture: Architecture, *, inputs: int) -> tuple[Head, int]:
    """ASPP and what smooths it, or what stands in its place, and the channels that it gives."""
    if architecture.cascade:
        return Head(), inputs
    if architecture.family == "fcn":  # torchvision's FCNHead, but for its last layer
        fewer = inputs // 4
        layers = conv_norm_relu(architecture.dims, inputs, fewer, kernel=3)
        return Head(*layers, nn.Dropout(0.1)), fewer
    width = aspp_width(architecture)
    dropout = 0.5 if architecture.smooth else 0.1  # torchvision, and the papers
    head = Head(Aspp(architecture, inputs=inputs, width=width, dropout=dropout))
    if architecture.smooth:
        head.extend(mix(architecture.dims, width, width, separable=architecture.separable))
    return head, width


_FAMILIES: MappingProxyType[str, type[DeepLab]] = MappingProxyType(
    {"v1": DeepLabV1, "v2": DeepLabV2, "v3": DeepLabV3, "v3plus": DeepLabV3, "fcn": DeepLabV3}
)


def build_network(architecture: Architecture, *, bands: int, classes: int) -> DeepLab:
    """A network with fresh weights, in training mode; image pooling over all that is read."""
    return _FAMILIES[architecture.family](architecture, bands=bands, classes=classes)


def network_of_file(
    architecture: Architecture,
    weights: Path,
    *,
    bands: int,
    classes: int,
    place: Callable[[Tensor], Tensor],
) -> DeepLab:
    """As ``build_network``, with the weights of a safetensors file, each as ``place`` returns it.

    They are in memory once, and never as the file has them.

    Raises:
        RuntimeError, SafetensorError: they are not those of such a network.
    """
    with torch.device("meta"), Unfilled():
        network = build_network(architecture, bands=bands, classes=classes)
    made, found = network.state_dict(), safetensors.torch.load_file(weights)
    floats = {key: part.to(made[key].dtype) if key in made else part for key, part in found.items()}
    network.load_state_dict({k: _copied(part, place) for k, part in floats.items()}, assign=True)
    return network


def _copied(mapped: Tensor, place: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy, as ``place`` returns it: what is mapped would follow a file that changes."""
    placed = place(mapped)
    return placed.clone() if placed.data_ptr() == mapped.data_ptr() else placed
