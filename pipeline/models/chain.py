"""The stages of a network, as values: what is computed window by window, between which maps.

Axes in array names: B batch, C channel, S space, (y, x) or (z, y, x). Regions are in features of
their own map, from the first that the network's input gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.domain import Shape
from pipeline.models.context_pool import WindowMean
from pipeline.models.geometry import Geometry, Scale, Slide
from pipeline.models.scene_mean import GivenMean, OwnMean


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
        assert isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm3d))
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
class Pool:
    """A pooling layer; an average counts the padding, as zeros."""

    slide: Slide
    kind: Literal["max", "average"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gate:
    """Squeeze-and-excitation: each channel by a factor that follows from the channels' means."""

    label: str
    """The layer's name and type for people."""

    narrow: Convolution
    widen: Convolution

    def over(self, features_BCS: Tensor) -> Tensor:
        """(B, C, 1, ..) factors between 0 and 1, from means over all of ``features_BCS``."""
        factor_BCS = features_BCS.mean(dim=tuple(range(2, features_BCS.ndim)), keepdim=True)
        for layer, bound in ((self.narrow, F.relu), (self.widen, F.hardsigmoid)):
            weight_OI = layer.weight.flatten(1)
            factor_BCS = bound(F.linear(factor_BCS.movedim(1, -1), weight_OI, layer.bias))
            factor_BCS = factor_BCS.movedim(-1, 1)
        return factor_BCS


Mean = WindowMean | GivenMean | OwnMean
Function = Literal["relu", "hardswish", "add", "max", "cat"]
Layer = Convolution | Norm | Pool | Scale | Mean | Gate | Function


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
    def geometry(self) -> Geometry | None:
        """How it lies over its input; None where it stays at its place, or pools a window."""
        layer = self.layer
        over: Geometry | None = layer if isinstance(layer, Scale) else None
        if isinstance(layer, (Convolution, Pool)):
            over = layer.slide
        return None if over is None or over.pointwise else over

    @property
    def spreads(self) -> bool:
        """Whether it reads beyond its own place, so that its input must be a map."""
        return self.geometry is not None or isinstance(self.layer, (WindowMean, OwnMean, Gate))


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """What lies between maps: the last step makes the map of the stage's name."""

    steps: tuple[Step, ...]

    eager: bool = False
    """Whether it runs as soon as a band of the one map that it reads is there, which need not be
    held then. It reads its own places, or is a sum of convolutions of single rows."""

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
            isinstance(layer, (OwnMean, Gate))
            or (isinstance(layer, WindowMean) and layer.window is None)
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

    upsample: Scale
    """From the coarse logits to the image."""

    stride: int
    """Pixels that tile origins are multiples of: the input moved by so many moves all maps."""

    @property
    def weight(self) -> Tensor:
        """Of a convolution: maps are in its floats, and windows computed where it lies."""
        steps = (step for stage in self.stages for step in stage.steps)
        return next(step.layer.weight for step in steps if isinstance(step.layer, Convolution))

    @property
    def logits(self) -> str:
        """Name of the coarse logits among the maps."""
        return self.stages[-1].name

    @property
    def endpoint(self) -> int:
        """Pixels of a valid side beyond a multiple of the stride: 1 where corners are aligned."""
        return int(self.upsample.align_corners)

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
            over = None if stage.eager else step.geometry
            shapes[stage.name] = over.shape(shapes[name]) if over else shapes[name]
        return shapes


def _moved(step: Step, move: Callable[[Tensor], Tensor]) -> Step:
    layer = step.layer
    if isinstance(layer, Convolution):
        layer = _moved_convolution(layer, move)
    elif isinstance(layer, Gate):
        narrow, widen = (_moved_convolution(c, move) for c in (layer.narrow, layer.widen))
        layer = replace(layer, narrow=narrow, widen=widen)
    elif isinstance(layer, Norm):
        layer = replace(
            layer,
            mean=move(layer.mean),
            variance=move(layer.variance),
            weight=_moved_or_none(layer.weight, move),
            bias=_moved_or_none(layer.bias, move),
        )
    return replace(step, layer=layer)


def _moved_convolution(layer: Convolution, move: Callable[[Tensor], Tensor]) -> Convolution:
    return replace(layer, weight=move(layer.weight), bias=_moved_or_none(layer.bias, move))


def _moved_or_none(tensor: Tensor | None, move: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if tensor is None else move(tensor)
