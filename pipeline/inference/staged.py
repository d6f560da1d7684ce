"""A network run stage by stage over one tile, each stage window by window.

Zeros are added at the border of what is read, and only there: that is the scene's border wherever
the tile reads what ``Reach.read`` asks for. Maps keep channels innermost in memory, and a window
is a run of whole rows (or planes), so that most are read without a copy; ``canonical`` has others.

Axes in array names: B batch, C channel, K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.domain import Region, Shape
from pipeline.inference.convolution import convolve
from pipeline.inference.map_layout import Layout
from pipeline.inference.stage_plan import Needs, row_block
from pipeline.models.chain import Chain, Convolution, Gate, Norm, Pool, Stage, Step
from pipeline.models.context_pool import WindowMean
from pipeline.models.custom_network import CustomNetwork
from pipeline.models.deeplab import DeepLab
from pipeline.models.frame import Frame
from pipeline.models.geometry import Scale
from pipeline.models.scene_mean import GivenMean, OwnMean
from pipeline.models.stages import TRACING

_POOL: Mapping[tuple[str, int], Callable[..., Tensor]] = MappingProxyType(
    {
        ("max", 2): F.max_pool2d,
        ("max", 3): F.max_pool3d,
        ("average", 2): F.avg_pool2d,
        ("average", 3): F.avg_pool3d,
    }
)
_FORMAT = MappingProxyType({2: torch.channels_last, 3: torch.channels_last_3d})

_FEW = 8
"""A window's side over what it may compute in vain at its end, rather than copy what it reads."""


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """Features of a region, all of them computed."""

    array_BSC: Tensor
    """(1, *S, C), contiguous."""

    region: Region

    @classmethod
    def laid(cls, memory: Tensor, region: Region, channels: int) -> FeatureMap:
        """A map of ``region``, not filled, at the front of a line of memory."""
        front = memory[: region.size * channels]
        return cls(front.view(1, *region.shape, channels), region)

    def reused(self, region: Region) -> FeatureMap:
        """A map of ``region``, inside this one, in this one's memory, packed to its front.

        In row-major order a place is never written before it has been read: the smaller map's
        offset of a place is nowhere greater than this one's.
        """
        return self.laid(self.array_BSC.flatten(), region, self.array_BSC.shape[-1])

    def view(self, region: Region) -> Tensor:
        """``region``, which lies inside, as (1, C, *S)."""
        index: tuple[slice, ...] = (slice(None), *region.slices(within=self.region))
        return self.array_BSC[index].movedim(-1, 1)

    def read(self, region: Region) -> Tensor:
        """What a layer that needs ``region`` is given: (1, C, *S), not to be written."""
        return self.view(region)


Windows = Callable[[Stage, Needs], Iterable[Region]]
"""The boxes of a stage's output that are computed at once; together they hold what is needed."""


class StagedNetwork:
    """The stages of a network, ready to run."""

    def __init__(self, chain: Chain, *, window: int) -> None:
        """Run ``chain`` over windows of as many features as a box of side ``window`` has."""
        self.chain, self.window = chain, window

    def coarse_logits(self, image_BCS: Tensor, frame: Frame, coarse: Region) -> Tensor:
        """Return (1, K, *S) logits of ``coarse``, in features of this input; a new tensor.

        ``image_BCS`` (1, C, *S) lies at ``frame``. Raises RegionError.
        """
        size = tuple(image_BCS.shape[2:])
        needs = Needs.of(self.chain, size, frame=frame, coarse=coarse)
        maps = {
            self.chain.image: FeatureMap(image_BCS.movedim(1, -1).contiguous(), Region.whole(size))
        }
        del image_BCS  # it goes with its map
        return run(self.chain, maps, needs, windows=self._rows).view(coarse)

    def _rows(self, stage: Stage, needs: Needs) -> Iterable[Region]:
        region = needs.regions[stage.name]
        most = region.size if stage.whole else self.window**region.ndim
        return region.blocks(row_block(region.shape, most))


class WholeNetwork:
    """A network that runs as one over all that is read."""

    def __init__(self, network: DeepLab | CustomNetwork) -> None:
        self.network = network

    def coarse_logits(self, image_BCS: Tensor, frame: Frame, coarse: Region) -> Tensor:
        """As ``StagedNetwork.coarse_logits``; a view."""
        with TRACING:  # another thread's tracing would take these calls for its own
            logits_BKS = self.network.coarse_logits(image_BCS, frame)
        whole = Region.whole(tuple(logits_BKS.shape[2:]))
        index: tuple[Any, ...] = (..., *coarse.slices(within=whole))
        return logits_BKS[index]


def run(chain: Chain, maps: dict[str, FeatureMap], needs: Needs, *, windows: Windows) -> FeatureMap:
    """The coarse logits that are needed of an image, by every stage in turn.

    ``maps`` holds the image alone; each map is taken out of it after its last reader.
    """
    layout, image = Layout.of(chain, needs), maps[chain.image]
    kind, like = type(image), image.array_BSC.new_empty(0)
    del image
    block = like.new_empty(layout.size)
    for stage in chain.stages:
        region = needs.regions[stage.name]
        if stage.overwrites is not None:
            result = maps[stage.overwrites].reused(region)
        elif stage.name in layout.starts:
            result = kind.laid(block[layout.starts[stage.name] :], region, stage.channels)
        else:
            result = kind.laid(like.new_empty(region.size * stage.channels), region, stage.channels)
        _fill(result, stage, maps, needs, windows(stage, needs))
        maps[stage.name] = result
        for name in stage.frees:
            del maps[name]
    return maps[chain.logits]


def _fill(
    result: FeatureMap,
    stage: Stage,
    maps: Mapping[str, FeatureMap],
    needs: Needs,
    windows: Iterable[Region],
) -> None:
    for window in windows:
        values: dict[str, Tensor] = {}
        for step in stage.steps[:-1]:
            values[step.name] = _apply(step, window, values=values, maps=maps, needs=needs)
        last, kept = stage.steps[-1], window & result.region
        target_BCS = result.view(kept)
        index: tuple[Any, ...] = (..., *kept.slices(within=window))
        if last.layer == "relu" and last.scratch:  # with the copy, in one
            torch.clamp_min(values[last.inputs[0]][index], 0, out=target_BCS)
        else:
            value_BCS = _apply(last, window, values=values, maps=maps, needs=needs)
            target_BCS.copy_(value_BCS[index])


def _apply(
    step: Step,
    window: Region,
    *,
    values: Mapping[str, Tensor],
    maps: Mapping[str, FeatureMap],
    needs: Needs,
) -> Tensor:
    """The step's value in ``window`` of the stage's output."""
    if isinstance(step.layer, WindowMean):
        means = step.layer.windows(window, size=needs.shapes[step.inputs[0]], frame=needs.frame)
        mean_BCS = means.mean(maps[step.inputs[0]].read(means.reads), within=means.reads)
        return mean_BCS.expand(-1, -1, *window.shape)
    if isinstance(step.layer, (GivenMean, OwnMean)):
        source = maps[step.inputs[0]]
        return step.layer.over(source.view(source.region)).expand(-1, -1, *window.shape)
    if isinstance(step.layer, Gate):
        source = maps[step.inputs[0]]
        return source.read(window) * step.layer.over(source.view(source.region))
    if step.geometry is not None:
        name = step.inputs[0]
        if isinstance(step.layer, Scale):
            return _resize(step.layer, maps[name], window, shape=needs.shapes[name])
        assert isinstance(step.layer, (Convolution, Pool))
        return _slide(step.layer, maps[name], window, shape=needs.shapes[name])
    inputs = [values[n] if n in values else maps[n].read(window) for n in step.inputs]
    if step.layer == "cat":
        return torch.cat(inputs, dim=1)
    if isinstance(step.layer, Convolution):
        return _convolve(step.layer, inputs[0], padding=(0,) * window.ndim)
    if isinstance(step.layer, Norm):
        return _normalise(step.layer, inputs[0], scratch=step.scratch)
    if step.layer == "relu":
        return inputs[0].relu_() if step.scratch else inputs[0].relu()
    if step.layer == "hardswish":
        return F.hardswish(inputs[0], inplace=step.scratch)
    first, second = inputs
    if step.layer == "max":
        return torch.maximum(first, second)
    return first.add_(second) if step.scratch else first + second


def _slide(
    layer: Convolution | Pool, source: FeatureMap, window: Region, *, shape: Shape
) -> Tensor:
    """The layer's output in ``window``, padded at the border of ``shape``, the map's own in all."""
    if isinstance(layer, Convolution):
        layer = without_idle_taps(layer, window, shape)
    reads = layer.slide.reads(window)
    inside = reads.clip(shape)
    lacks = [
        (b - a, c - d)
        for a, b, c, d in zip(reads.start, inside.start, reads.stop, inside.stop, strict=True)
    ]
    padding = tuple(
        _own_padding(ends, side, stride)
        for ends, side, stride in zip(lacks, window.shape, layer.slide.stride, strict=True)
    )
    part_BCS = source.read(inside)
    fill = [
        max(0, side - own)
        for ends, own in zip(reversed(lacks), reversed(padding), strict=True)
        for side in ends
    ]
    if any(fill):
        edge = -math.inf if isinstance(layer, Pool) and layer.kind == "max" else 0.0
        part_BCS = F.pad(part_BCS, fill, value=edge)
    if isinstance(layer, Convolution):
        result_BCS = _convolve(layer, part_BCS, padding=padding)
    else:
        slide, pool = layer.slide, _POOL[layer.kind, window.ndim]
        rate = (slide.dilation,) if layer.kind == "max" else ()
        result_BCS = pool(part_BCS, slide.kernel, slide.stride, padding, *rate)
    kept: tuple[Any, ...] = (
        ...,
        *(
            slice(max(0, own - ends[0]), max(0, own - ends[0]) + side)
            for ends, own, side in zip(lacks, padding, window.shape, strict=True)
        ),
    )
    # Batch norm computes in another way, and rounds otherwise, where memory has gaps.
    return result_BCS[kept].contiguous(memory_format=_FORMAT[window.ndim])


def _resize(scale: Scale, source: FeatureMap, window: Region, *, shape: Shape) -> Tensor:
    """The resized map in ``window``; ``shape`` is the map's own in all."""
    reads = scale.reads(window).clip(shape)
    resized_BCS: Tensor = scale.layer(source.read(reads))
    kept: tuple[Any, ...] = (..., *window.slices(within=scale.gives(reads)))
    return resized_BCS[kept].contiguous(memory_format=_FORMAT[window.ndim])


def _own_padding(lacks: tuple[int, int], side: int, stride: int) -> int:
    """What a layer pads itself, without a copy, at both ends of an axis that lacks so much.

    At an end that lacks less it computes places that are cut off again, where those are few.
    """
    few = stride == 1 and _FEW * max(lacks) <= side
    return max(lacks) if few else min(lacks)


def without_idle_taps(layer: Convolution, window: Region, shape: Shape) -> Convolution:
    """The layer without the outer taps that meet nothing but padding all over ``window``.

    ``shape`` is that of the whole input.
    """
    slide, weight = layer.slide, layer.weight
    kernel, padding = list(slide.kernel), list(slide.padding)
    for axis, (first, stop) in enumerate(zip(window.start, window.stop, strict=True)):
        step, rate = slide.stride[axis], slide.dilation[axis]
        start, end = first * step - padding[axis], (stop - 1) * step - padding[axis]
        taps = range(kernel[axis])
        used = [t for t in taps if end + t * rate >= 0 and start + t * rate < shape[axis]]
        if len(used) < len(taps):
            weight = weight.narrow(axis + 2, used[0], len(used))
            kernel[axis], padding[axis] = len(used), padding[axis] - used[0] * rate
    if weight is layer.weight:
        return layer
    weight = weight.contiguous(memory_format=_FORMAT[len(kernel)])
    cut = replace(slide, kernel=tuple(kernel), padding=tuple(padding))
    return replace(layer, slide=cut, weight=weight)


def _convolve(layer: Convolution, part_BCS: Tensor, *, padding: Sequence[int]) -> Tensor:
    slide = layer.slide
    geometry = slide.stride, padding, slide.dilation
    return convolve(part_BCS, layer.weight, layer.bias, *geometry, layer.groups)


def _normalise(norm: Norm, features_BCS: Tensor, *, scratch: bool) -> Tensor:
    result_BCS = features_BCS if scratch else torch.empty_like(features_BCS)
    unused = norm.mean.new_empty(0), norm.mean.new_empty(0)  # statistics of training
    # What F.batch_norm calls, which cannot write over its input.
    torch.native_batch_norm(
        features_BCS,
        norm.weight,
        norm.bias,
        norm.mean,
        norm.variance,
        False,
        0.0,
        norm.epsilon,
        out=(result_BCS, *unused),
    )
    return result_BCS
