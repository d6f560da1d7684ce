"""A network as a chain of stages, each of which runs window by window without redoing any work.

A value that a layer reads beyond its own place (a convolution wider than 1, a stride, image
pooling) is a feature map and kept whole; everything between two maps is a stage, in which a window
of the output needs, besides the maps, only its own places. Every layer does the arithmetic that it
does in the whole network: batch norm folded into the convolution before it would move the logits
of a deep network by more than their rounding.

Axes in array names: B batch, C channel, S space, (y, x) or (z, y, x). Regions are in features of
their own map, from the first that the network's input gives.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from pipeline.domain import Region, Shape
from pipeline.errors import BundleError
from pipeline.models.context_pool import ContextPool, WindowMean
from pipeline.models.deeplab import DeepLab
from pipeline.models.receptive_field import TRACING, Tracer
from pipeline.models.scene_mean import GivenMean, OwnMean

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
_POOLS = (nn.MaxPool2d, nn.MaxPool3d)
_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)
_NOTHING = (nn.Dropout, nn.Identity)
_ADDITIONS = (torch.add, operator.add, operator.iadd)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slide:
    """How a layer slides over its input, per axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, layer: nn.Module, ndim: int) -> Slide:
        """Of a convolution or max-pooling layer."""
        names = {"kernel": "kernel_size"} | {n: n for n in ("stride", "padding", "dilation")}
        return cls(**{key: _per_axis(getattr(layer, name), ndim) for key, name in names.items()})

    @property
    def pointwise(self) -> bool:
        """Whether a place of the output needs the same place of the input, and no other."""
        return set(self.kernel + self.stride) == {1} and set(self.padding) == {0}

    def shape(self, shape: Shape) -> Shape:
        """Shape of the output for an input of ``shape``."""
        rows = zip(shape, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in rows)

    def reads(self, region: Region) -> Region:
        """What ``region`` of the output needs of the input; may reach outside it."""
        rows = list(zip(self.stride, self.padding, self.dilation, self.kernel, strict=True))
        return Region(
            tuple(a * s - p for a, (s, p, _, _) in zip(region.start, rows, strict=True)),
            tuple(
                (b - 1) * s - p + d * (k - 1) + 1
                for b, (s, p, d, k) in zip(region.stop, rows, strict=True)
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Convolution:
    """A convolution, and the batch norm after it."""

    slide: Slide

    weight: Tensor
    """(outputs, inputs / groups, *kernel)."""

    bias: Tensor | None
    groups: int

    @property
    def work(self) -> int:
        """Multiply-adds per place of the output."""
        return self.weight.numel()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Norm:
    """Batch norm with fixed statistics."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    epsilon: float

    @classmethod
    def of(cls, layer: nn.Module) -> Norm:
        """Of a batch norm in eval mode that keeps statistics."""
        assert isinstance(layer, _NORMS)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        return cls(
            mean=layer.running_mean,
            variance=layer.running_var,
            weight=layer.weight,
            bias=layer.bias,
            epsilon=layer.eps,
        )


@dataclass(frozen=True, slots=True)
class MaxPool:
    """A max-pooling layer."""

    slide: Slide


Mean = WindowMean | GivenMean | OwnMean
Layer = Convolution | Norm | MaxPool | Mean | Literal["relu", "add", "cat"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """One operation of a stage."""

    name: str
    """Of the value that it makes."""

    inputs: tuple[str, ...]
    layer: Layer

    channels: int
    """Of the value that it makes."""

    scratch: bool = False
    """Whether its first input is made in the same stage and read by this step alone."""

    @property
    def slide(self) -> Slide | None:
        """How it moves over its input; None where it stays at its place, or pools a window."""
        if not isinstance(self.layer, (Convolution, MaxPool)) or self.layer.slide.pointwise:
            return None
        return self.layer.slide

    @property
    def spreads(self) -> bool:
        """Whether it reads beyond its own place, so that its input must be a map."""
        return self.slide is not None or isinstance(self.layer, (WindowMean, OwnMean))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stage:
    """What lies between maps: the last step makes the map of the stage's name."""

    steps: tuple[Step, ...]

    overwrites: str | None
    """A map of the same places that nobody reads afterwards, whose memory the output may take."""

    frees: tuple[str, ...]
    """Maps that nobody reads after this stage."""

    @property
    def name(self) -> str:
        """Of the map that it makes."""
        return self.steps[-1].name

    @property
    def channels(self) -> int:
        """Of the map that it makes."""
        return self.steps[-1].channels

    @property
    def whole(self) -> bool:
        """Whether it must run at once: a mean over all that is read is the same everywhere."""
        return any(
            isinstance(layer, OwnMean) or (isinstance(layer, WindowMean) and layer.window is None)
            for layer in (step.layer for step in self.steps)
        )

    @property
    def work(self) -> int:
        """Multiply-adds per place of the output."""
        return sum(s.layer.work for s in self.steps if isinstance(s.layer, Convolution))

    def reads(self) -> Iterator[tuple[Step, str]]:
        """The maps it reads, each with the step that does."""
        made = {step.name for step in self.steps}
        return ((step, name) for step in self.steps for name in step.inputs if name not in made)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chain:
    """The stages of a network, from the image to the coarse logits."""

    stages: tuple[Stage, ...]

    image: str
    """Name of the image among the maps."""

    bands: int
    """Channels of the image."""

    stride: int
    """Pixels between neighbouring coarse logits."""

    @property
    def logits(self) -> str:
        """Name of the coarse logits among the maps."""
        return self.stages[-1].name

    @property
    def channels(self) -> dict[str, int]:
        """Of every map."""
        return {self.image: self.bands} | {stage.name: stage.channels for stage in self.stages}

    def moved(self, move: Callable[[Tensor], Tensor]) -> Chain:
        """The same chain with ``move`` applied to every weight and bias."""
        stages = (
            replace(stage, steps=tuple(_moved(step, move) for step in stage.steps))
            for stage in self.stages
        )
        return replace(self, stages=tuple(stages))

    def shapes(self, size: Shape) -> dict[str, Shape]:
        """Shape of every map for an input of ``size`` px that runs whole."""
        shapes = {self.image: size}
        for stage in self.stages:
            step, name = next(stage.reads())
            slide = step.slide
            shapes[stage.name] = slide.shape(shapes[name]) if slide else shapes[name]
        return shapes


def stages_of(network: DeepLab) -> Chain:
    """Take a network in eval mode apart. Raises BundleError where a layer is not known."""
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
    ordered = [tuple(groups[step.name]) for step in trace.steps if step.name in groups]
    return Chain(
        stages=tuple(_stages(ordered, trace)),
        image=trace.image,
        bands=network.bands,
        stride=network.architecture.output_stride,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Trace:
    """What the network does, in order, and the values that must be maps."""

    steps: tuple[Step, ...]
    image: str
    output: str
    pooled: tuple[str, ...]


def _stages(groups: list[tuple[Step, ...]], trace: _Trace) -> Iterator[Stage]:
    """Stages of these steps, with what each may overwrite and free."""
    stages = [Stage(steps=steps, overwrites=None, frees=()) for steps in groups]
    last = {name: stage.name for stage in stages for _, name in stage.reads()}
    channels = {stage.name: stage.channels for stage in stages}
    for stage in stages:
        frees = tuple(name for name, reader in last.items() if reader == stage.name)
        spread = {name for step, name in stage.reads() if step.spreads}
        heirs = [
            name
            for name in frees
            if name != trace.image and name not in spread and channels[name] == stage.channels
        ]
        yield replace(stage, frees=frees, overwrites=heirs[0] if heirs else None)


def _trace(network: DeepLab) -> _Trace:
    with TRACING:
        graph = Tracer().trace(network)
    parts = dict(network.named_modules())
    ndim = network.architecture.dims
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
            made = _layer(node, layer, ndim)
            width = _channels(made, [steps[i].channels if i in steps else 0 for i in inputs])
            steps[node.name] = Step(name=node.name, inputs=inputs, layer=made, channels=width)
    raise BundleError("the network does not end with its upsampling layer")


def _layer(node: fx.Node, layer: nn.Module | None, ndim: int) -> Layer:
    if isinstance(layer, _CONVOLUTIONS) and layer.padding_mode == "zeros":
        return _convolution(layer, ndim)
    if isinstance(layer, _NORMS) and layer.track_running_stats:
        return Norm.of(layer)
    if isinstance(layer, _POOLS) and not layer.ceil_mode:
        return MaxPool(Slide.of(layer, ndim))
    if isinstance(layer, nn.ReLU):
        return "relu"
    if layer is None and node.target is torch.cat and (*node.args, node.kwargs.get("dim"))[1] == 1:
        return "cat"
    if layer is None and node.target in _ADDITIONS and len(node.all_input_nodes) == 2:
        return "add"
    name = f"{node.target} ({type(layer).__name__})" if layer else str(node.target)
    raise BundleError(f"layer {name} cannot run in windows: run the network as one")


def _pooling(pool: ContextPool, *, name: str, read: str) -> Iterable[Step]:
    """Image pooling in eval mode: 1x1 convolution and norm, then the mean of fewer channels."""
    mean, layer, norm, _ = pool
    assert isinstance(mean, WindowMean)
    assert isinstance(layer, _CONVOLUTIONS)
    made = _convolution(layer, layer.weight.ndim - 2)
    parts: tuple[tuple[str, Layer], ...] = (
        (f"{name}_point", made),
        (f"{name}_norm", Norm.of(norm)),
        (f"{name}_mean", mean),
        (name, "relu"),
    )
    for label, operation in parts:
        yield Step(name=label, inputs=(read,), layer=operation, channels=layer.out_channels)
        read = label


def _convolution(layer: nn.Conv2d | nn.Conv3d, ndim: int) -> Convolution:
    slide = Slide.of(layer, ndim)
    return Convolution(slide=slide, weight=layer.weight, bias=layer.bias, groups=layer.groups)


def _channels(layer: Layer, inputs: list[int]) -> int:
    if isinstance(layer, Convolution):
        return layer.weight.shape[0]
    return sum(inputs) if layer == "cat" else inputs[0]


def _moved(step: Step, move: Callable[[Tensor], Tensor]) -> Step:
    layer = step.layer
    if isinstance(layer, Convolution):
        layer = replace(layer, weight=move(layer.weight), bias=_moved_or_none(layer.bias, move))
    elif isinstance(layer, Norm):
        layer = replace(
            layer,
            mean=move(layer.mean),
            variance=move(layer.variance),
            weight=_moved_or_none(layer.weight, move),
            bias=_moved_or_none(layer.bias, move),
        )
    return replace(step, layer=layer)


def _moved_or_none(tensor: Tensor | None, move: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if tensor is None else move(tensor)


def _per_axis(value: Any, ndim: int) -> tuple[int, ...]:
    return (value,) * ndim if isinstance(value, int) else tuple(value)
