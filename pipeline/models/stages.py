"""A network as a chain of stages, each of which runs window by window without redoing any work.

A value that a layer reads beyond its own place (a convolution wider than 1, a stride, a change of
resolution, image pooling) is a feature map and kept whole; everything between two maps is a stage,
in which a window of the output needs, besides the maps, only its own places. Every layer does the
arithmetic that it does in the whole network: batch norm folded into the convolution before it
would move the logits of a deep network by more than their rounding.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import fx, nn

from pipeline.errors import BundleError
from pipeline.models.chain import Chain, Convolution, Gate, Layer, Norm, Pool, Stage, Step
from pipeline.models.context_pool import ContextPool, WindowMean
from pipeline.models.deeplab import DeepLab
from pipeline.models.geometry import Scale, Slide
from pipeline.models.global_layers import (
    is_global_layer,
    is_squeeze_excitation,
    layer_label,
    mixes_scene,
)
from pipeline.models.resize import Resize

if TYPE_CHECKING:
    from torchvision.ops import SqueezeExcitation

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
_MAX_POOLS = (nn.MaxPool2d, nn.MaxPool3d)
_AVERAGE_POOLS = (nn.AvgPool2d, nn.AvgPool3d)
_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)
_NOTHING = (nn.Dropout, nn.Identity)
_ADDITIONS = (torch.add, operator.add, operator.iadd)

TRACING = threading.Lock()
"""Held while a network is traced, which patches every module of this process, and while one is
called beside threads that may trace."""


class Tracer(fx.Tracer):
    """Leaves whole what is one layer to us, and global layers: what they need has no bounds."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether to look no further into ``m``."""
        whole = isinstance(m, (ContextPool, Resize)) or is_global_layer(m)
        return whole or super().is_leaf_module(m, module_qualified_name)


def stages_of(network: DeepLab) -> Chain:
    """Take a network in eval mode apart.

    Raises:
        BundleError: a layer that mixes the whole scene, or is not known.
    """
    trace = _trace(network)
    users: dict[str, list[Step]] = {step.name: [] for step in trace.steps}
    for step in trace.steps:
        for name in step.inputs:
            users.setdefault(name, []).append(step)
    maps = {name for step in trace.steps if step.spreads for name in step.inputs}
    maps |= {trace.output, *trace.pooled}
    owner: dict[str, str] = {}
    for step in reversed(trace.steps):
        owners = {owner[user.name] for user in users[step.name] if user.name in owner}
        if step.name in maps or len(owners) > 1:
            owner[step.name] = step.name
        elif owners:
            owner[step.name] = owners.pop()
    groups: dict[str, list[Step]] = {name: [] for name in owner if owner[name] == name}
    for step in trace.steps:
        if step.name in owner:
            first = step.inputs[0]
            lone = owner.get(first) not in (None, first) and len(users[first]) == 1
            groups[owner[step.name]].append(replace(step, scratch=lone))
    ordered = (tuple(groups[step.name]) for step in trace.steps if step.name in groups)
    return Chain(
        stages=tuple(Stage(steps) for steps in ordered),
        image=trace.image,
        bands=network.bands,
        upsample=Scale.of(network.upsample),
        stride=network.stride,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Trace:
    """What the network does, in order, and the values that must be maps."""

    steps: tuple[Step, ...]
    image: str
    output: str
    pooled: tuple[str, ...]


def _trace(network: DeepLab) -> _Trace:
    with TRACING:
        graph = Tracer().trace(network)
    parts = dict(network.named_modules())
    steps: dict[str, Step] = {}
    alias: dict[str, str] = {}
    pooled: list[str] = []
    image = ""
    for node in graph.nodes:
        layer = parts.get(str(node.target)) if node.op == "call_module" else None
        inputs = tuple(alias[n.name] for n in node.all_input_nodes if n.name in alias)
        if node.op == "placeholder":
            if not image:  # the frame, which is second, holds no pixels
                image = alias[node.name] = node.name
            continue
        if layer is network.upsample:
            return _Trace(
                steps=tuple(steps.values()), image=image, output=inputs[0], pooled=tuple(pooled)
            )
        alias[node.name] = node.name
        if isinstance(layer, _NOTHING):
            alias[node.name] = inputs[0]
        elif isinstance(layer, ContextPool):
            added = _pooling(layer, name=node.name, read=inputs[0])
            steps |= {step.name: step for step in added}
            pooled.append(node.name)
        else:
            made = _layer(node, layer, network)
            widths = [steps[i].channels if i in steps else network.bands for i in inputs]
            width = _channels(made, widths)
            steps[node.name] = Step(name=node.name, inputs=inputs, layer=made, channels=width)
    raise BundleError("the network does not end with its upsampling layer")


def _layer(node: fx.Node, layer: nn.Module | None, network: DeepLab) -> Layer:
    label = layer_label(node, layer)
    if _squeezes(layer):
        return Gate(label=label, narrow=_convolution(layer.fc1), widen=_convolution(layer.fc2))
    if mixes_scene(node, layer):
        raise BundleError(
            f"layer {label} mixes the whole scene, so that no halo makes its tiles agree: only the"
            " image pooling of ASPP may do that"
        )
    made = _merge(node) if layer is None else _module(layer, network)
    if made is None:
        raise BundleError(f"the receptive field of layer {label} is not known")
    return made


def _merge(node: fx.Node) -> Layer | None:
    """A function of several values; None for one that is not known."""
    if node.target is torch.cat and (*node.args, node.kwargs.get("dim"))[1] == 1:
        return "cat"
    if len(node.all_input_nodes) != 2:
        return None
    if node.target in _ADDITIONS:
        return "add"
    return "max" if node.target is torch.maximum else None


def _module(layer: nn.Module, network: DeepLab) -> Layer | None:
    """A layer; None for one that is not known."""
    ndim = network.architecture.dims
    if isinstance(layer, _CONVOLUTIONS) and layer.padding_mode == "zeros":
        return _convolution(layer)
    if isinstance(layer, _NORMS) and layer.track_running_stats:
        return Norm.of(layer)
    if isinstance(layer, nn.ReLU):
        return "relu"
    if isinstance(layer, nn.Hardswish):
        return "hardswish"
    if isinstance(layer, Resize) and layer.align_corners == network.upsample.align_corners:
        return Scale.of(layer)
    average = isinstance(layer, _AVERAGE_POOLS) and layer.count_include_pad
    if average or isinstance(layer, _MAX_POOLS):
        slide = Slide.of(layer, ndim)
        if not layer.ceil_mode or slide.fits(endpoint=int(network.upsample.align_corners)):
            return Pool(slide, "average" if average else "max")
    return None


def _pooling(pool: ContextPool, *, name: str, read: str) -> Iterable[Step]:
    """Image pooling in eval mode: 1x1 convolution and norm, then the mean of fewer channels."""
    mean, layer, norm, _ = pool
    assert isinstance(mean, WindowMean)
    assert isinstance(layer, _CONVOLUTIONS)
    made = _convolution(layer)
    parts: tuple[tuple[str, Layer], ...] = (
        (f"{name}_point", made),
        (f"{name}_norm", Norm.of(norm)),
        (f"{name}_mean", mean),
        (name, "relu"),
    )
    for label, operation in parts:
        yield Step(name=label, inputs=(read,), layer=operation, channels=layer.out_channels)
        read = label


def _squeezes(layer: nn.Module | None) -> TypeGuard[SqueezeExcitation]:
    """Whether it is squeeze-and-excitation in the form that MobileNetV3 has."""
    return (
        is_squeeze_excitation(layer)
        and isinstance(layer.activation, nn.ReLU)
        and isinstance(layer.scale_activation, nn.Hardsigmoid)
    )


def _convolution(layer: nn.Conv2d | nn.Conv3d) -> Convolution:
    slide = Slide.of(layer, layer.weight.ndim - 2)
    return Convolution(slide=slide, weight=layer.weight, bias=layer.bias, groups=layer.groups)


def _channels(layer: Layer, inputs: list[int]) -> int:
    if isinstance(layer, Convolution):
        return layer.weight.shape[0]
    return sum(inputs) if layer == "cat" else inputs[0]
