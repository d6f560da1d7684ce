"""What a network's output needs of its input: interval arithmetic over the real layers.

The network is traced with ``torch.fx``; every value is followed forwards as "element i depends on
pixels [stride x i + low, stride x i + high]", per axis (Araujo, Norris and Sim, Distill 2019).
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from pipeline.domain import ContextWindow, Halo, Reach
from pipeline.errors import BundleError
from pipeline.models.context_pool import Context, ContextPool
from pipeline.models.deeplab import DeepLab
from pipeline.models.global_layers import GLOBAL_LAYERS, layer_label, mixes_scene
from pipeline.models.resize import Resize

_POINTWISE = (nn.BatchNorm2d, nn.BatchNorm3d, nn.ReLU, nn.Dropout, nn.Identity)
_SLIDING = (nn.Conv2d, nn.Conv3d, nn.MaxPool2d, nn.MaxPool3d)
_MERGES = (torch.cat, torch.add, operator.add, operator.iadd)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Element i depends on ``[stride*i + low, stride*i + high]`` of the origin, per axis."""

    stride: tuple[int, ...]
    """Elements of the origin between neighbouring elements."""

    low: tuple[int, ...]
    """First element that element 0 depends on."""

    high: tuple[int, ...]
    """Last element that element 0 depends on."""

    @classmethod
    def start(cls, ndim: int, *, stride: int) -> Span:
        """An origin, whose elements lie ``stride`` px apart."""
        return cls(stride=(stride,) * ndim, low=(0,) * ndim, high=(0,) * ndim)

    def slide(self, layer: nn.Module) -> Span:
        """Through a convolution or max-pooling layer."""
        ndim = len(self.stride)
        kernel, step, padding, dilation = (
            _per_axis(getattr(layer, name), ndim)
            for name in ("kernel_size", "stride", "padding", "dilation")
        )
        rows = zip(self.stride, self.low, self.high, kernel, padding, dilation, strict=True)
        ends = [(low - s * p, high + s * (d * (k - 1) - p)) for s, low, high, k, p, d in rows]
        return Span(
            stride=tuple(s * t for s, t in zip(self.stride, step, strict=True)),
            low=tuple(low for low, _ in ends),
            high=tuple(high for _, high in ends),
        )

    def __or__(self, other: Span) -> Span:
        """Of a value made from two: the smallest span that contains both."""
        if self.stride != other.stride:
            raise BundleError(
                f"branches of strides {self.stride} and {other.stride} px meet; their receptive"
                " field is not known: resample them to one stride first"
            )
        return Span(
            stride=self.stride,
            low=tuple(map(min, self.low, other.low)),
            high=tuple(map(max, self.high, other.high)),
        )

    def halo_upsampled(self, factor: int) -> Halo:
        """Context of a stride-aligned region after linear upsampling, corners not aligned."""
        floors = [math.floor((x + 0.5) / factor - 0.5) for x in range(factor)]
        pairs = list(zip(self.stride, self.low, self.high, strict=True))
        return Halo(
            before=tuple(max(0, *(-s * f - low for f in floors)) for s, low, _ in pairs),
            after=tuple(max(0, *(s * (f + 1) + hi - s + 1 for f in floors)) for s, _, hi in pairs),
        )

    def halo(self) -> Halo:
        """Context of a region that is a whole number of elements."""
        return Halo(
            before=tuple(max(0, -low) for low in self.low),
            after=tuple(
                max(0, high - s + 1) for s, high in zip(self.stride, self.high, strict=True)
            ),
        )


@dataclass(frozen=True, slots=True)
class _Paths:
    """How a value depends on the image, and on what is pooled; None where it does not."""

    image: Span | None
    pooled: Span | None

    def slide(self, layer: nn.Module) -> _Paths:
        return _Paths(
            None if self.image is None else self.image.slide(layer),
            None if self.pooled is None else self.pooled.slide(layer),
        )

    def __or__(self, other: _Paths) -> _Paths:
        return _Paths(_union(self.image, other.image), _union(self.pooled, other.pooled))


TRACING = threading.Lock()
"""Held while a network is traced, which patches every module of this process, and while one is
called beside threads that may trace."""


class Tracer(fx.Tracer):
    """Leaves image pooling and global layers whole: what they need is not a span."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether to look no further into ``m``."""
        whole = isinstance(m, (ContextPool, Resize, *GLOBAL_LAYERS))
        return whole or super().is_leaf_module(m, module_qualified_name)


def local_span(network: DeepLab) -> Span:
    """What a coarse logit needs of the image, image pooling left out."""
    span = _walk(network).logits.image
    assert span is not None
    return span


def reach_of(network: DeepLab, *, context: Context = "window") -> Reach:
    """The reach of a network, in pixels.

    Args:
        network: as ``Bundle.network`` gives it.
        context: ``window`` counts the image-pooling window. ``scene`` counts what the pooled
            features need, whose mean a pass of its own takes. ``tile`` leaves pooling out, and
            the network then is not exact.

    Raises:
        BundleError: a layer that mixes the whole scene or whose receptive field is not known, or
            image pooling without window.
    """
    found = _walk(network)
    stride = network.architecture.output_stride
    assert found.logits.image is not None
    halo = found.logits.image.halo_upsampled(stride).round_up(stride)
    if network.pool is None or context == "tile":
        return Reach(stride=stride, halo=halo)
    if context == "scene":
        assert found.trunk is not None
        return Reach(stride=stride, halo=halo, pooled=found.trunk.halo().round_up(stride))
    window = network.pool.mean.window
    if window is None or found.trunk is None or found.logits.pooled is None:
        raise BundleError(
            "the image pooling of this network has no window, so that its reach is the scene:"
            " give it the training crop (pool_over), or ask for context 'tile'"
        )
    return Reach(
        stride=stride,
        halo=halo,
        window=ContextWindow(
            size=tuple(side * stride for side in window),
            inner=found.logits.pooled.halo_upsampled(stride),
            outer=found.trunk.halo(),
        ),
    )


@dataclass(frozen=True, slots=True)
class _Walk:
    """Paths of the coarse logits, and of the features that are pooled."""

    logits: _Paths
    trunk: Span | None


def _walk(network: DeepLab) -> _Walk:
    with TRACING:
        graph = Tracer().trace(network)
    parts = dict(network.named_modules())
    ndim, stride = network.architecture.dims, network.architecture.output_stride
    image = Span.start(ndim, stride=1)
    paths: dict[fx.Node, _Paths] = {}
    trunk: Span | None = None
    for node in graph.nodes:
        inputs = [paths[arg] for arg in node.all_input_nodes if arg in paths]
        layer = parts.get(str(node.target)) if node.op == "call_module" else None
        if node.op == "placeholder":
            if not paths:  # the image; the frame, which is second, holds no pixels
                paths[node] = _Paths(image, None)
        elif mixes_scene(node, layer):
            raise BundleError(
                f"layer {layer_label(node, layer)} mixes the whole scene, so that no halo makes its"
                " tiles agree: only the image pooling of ASPP may do that"
            )
        elif layer is network.upsample:
            _check_stride(inputs[0], stride)
            return _Walk(inputs[0], trunk)
        elif isinstance(layer, ContextPool):
            trunk = inputs[0].image
            paths[node] = _Paths(None, Span.start(ndim, stride=stride))
        elif layer is not None and isinstance(layer, _SLIDING):
            paths[node] = inputs[0].slide(layer)
        elif isinstance(layer, _POINTWISE) or (layer is None and node.target in _MERGES):
            paths[node] = _merge(inputs)
        else:
            raise BundleError(
                f"the receptive field of layer {layer_label(node, layer)} is not known"
            )
    raise BundleError("the network does not end with its upsampling layer")


def _check_stride(paths: _Paths, stride: int) -> None:
    if paths.image is None or set(paths.image.stride) != {stride}:
        found = None if paths.image is None else paths.image.stride
        raise BundleError(f"output stride {stride} px stated, the layers have {found}")


def _merge(inputs: Sequence[_Paths]) -> _Paths:
    merged = inputs[0]
    for paths in inputs[1:]:
        merged |= paths
    return merged


def _union(first: Span | None, second: Span | None) -> Span | None:
    if first is None or second is None:
        return first or second
    return first | second


def _per_axis(value: Any, ndim: int) -> tuple[int, ...]:
    return (value,) * ndim if isinstance(value, int) else tuple(value)
