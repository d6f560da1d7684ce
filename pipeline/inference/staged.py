"""A network run stage by stage over one tile, each stage window by window.

Zeros are added at the border of what is read, and only there: that is the scene's border wherever
the tile reads what ``Reach.read`` asks for. Maps keep channels innermost in memory, and a window
is a run of whole rows (or planes), so that most are read without a copy; ``canonical`` has others.

Axes in array names: B batch, C channel, K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.domain import Region, Shape
from pipeline.inference.convolution import convolve
from pipeline.inference.feature_map import FeatureMap, HostMap
from pipeline.inference.map_layout import Layout, row_size
from pipeline.inference.row_sums import lead
from pipeline.inference.stage_plan import Needs, block_of, own_padding, row_bands
from pipeline.inference.turns import Turn, Turns
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


class Picture(Protocol):
    """(1, C, *S) pixels: a tensor, or what makes parts of one when asked."""

    @property
    def shape(self) -> Sequence[int]:
        """(1, C, *S)."""

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor:
        """A part, with all channels; may alias."""


class StagedNetwork:
    """The stages of a network, ready to run."""

    def __init__(self, chain: Chain, *, window: int, hosted: bool = False) -> None:
        """Run ``chain`` over windows of as many features as a box of side ``window`` has.

        With ``hosted``, maps are held in the memory of the host, wherever the weights are.
        """
        self.chain, self.window = chain, window
        self.kind = HostMap if hosted else FeatureMap

    def coarse_logits(self, image_BCS: Picture, frame: Frame, coarse: Region) -> Tensor:
        """Return (1, K, *S) logits of ``coarse``, in features of this input; a new tensor.

        ``image_BCS`` (1, C, *S) lies at ``frame``. Raises RegionError.
        """
        size = tuple(image_BCS.shape[2:])
        needs = Needs.of(self.chain, size, frame=frame, coarse=coarse)
        image = parts_of(image_BCS, Region.whole(size))
        return run(self.chain, needs, image, window=self.window, kind=self.kind).view(coarse)


class WholeNetwork:
    """A network that runs as one over all that is read."""

    def __init__(self, network: DeepLab | CustomNetwork) -> None:
        self.network = network

    def coarse_logits(self, image_BCS: Picture, frame: Frame, coarse: Region) -> Tensor:
        """As ``StagedNetwork.coarse_logits``; a view."""
        with TRACING:  # another thread's tracing would take these calls for its own
            logits_BKS = self.network.coarse_logits(image_BCS[:, :], frame)
        whole = Region.whole(tuple(logits_BKS.shape[2:]))
        index: tuple[Any, ...] = (..., *coarse.slices(within=whole))
        return logits_BKS[index]


def parts_of(image_BCS: Picture, read: Region) -> Callable[[Region], Tensor]:
    """What gives any part of an image that lies at ``read``, in the same coordinates."""
    return lambda part: image_BCS[slice(None), slice(None), *part.slices(within=read)]


def run(
    chain: Chain,
    needs: Needs,
    image: Callable[[Region], Tensor],
    *,
    window: int,
    kind: type[FeatureMap],
) -> FeatureMap:
    """The coarse logits that are needed of an image, by every stage in its turns.

    The logits' memory is their own.

    Args:
        chain: the network's stages.
        needs: of the tile.
        image: gives a region of it, (1, C, *S), as often as it is asked for a band.
        window: as ``block_of`` takes it.
        kind: of map.
    """
    turns = Turns.of(chain, needs, window=window)
    maps = _laid(chain, needs, turns, kind)
    stages = {stage.name: stage for stage in chain.stages}
    for turn in turns.order:
        name, first, stop, keep = turn
        result, needed, stage = maps[name], needs.regions[name], stages.get(name)
        if stage and stage.eager:
            _follow(stage, maps, needs, turn, window=window)
            continue
        result.roll(min(stop, needed.stop[0]), keep=keep)
        whole = needs.computed(stage) if stage else needed
        band = Region((first, *whole.start[1:]), (stop, *whole.stop[1:]))
        if stage:
            windows = band.blocks(block_of(stage, needs, window))
            _fill(result, stage, maps, needs, windows)
        else:
            result.write(band, image(band))
    return maps[chain.logits]


def _follow(
    stage: Stage, maps: Mapping[str, FeatureMap], needs: Needs, turn: Turn, *, window: int
) -> None:
    """The turn of an eager stage: all that the rows which were made last add to its map."""
    result, needed = maps[stage.name], needs.regions[stage.name]
    reads, block = list(stage.reads()), block_of(stage, needs, window)

    def band(by: int) -> Region:
        """The rows to which those made last belong as the row of a kernel."""
        start, stop = turn.first + by, turn.stop + by
        return Region((start, *needed.start[1:]), (stop, *needed.stop[1:])) & needed

    ahead = band(max(lead(step) for step, _ in reads)).stop[0]
    result.roll(max(ahead, result.region.stop[0]), keep=turn.keep)
    if len(reads) == 1:
        _fill(result, stage, maps, needs, band(0).blocks(block))
        return
    fresh = needed.stop[0]
    for step, name in reads:
        assert isinstance(step.layer, Convolution)
        for part in band(lead(step)).blocks(block):
            value_BCS = _slide(step.layer, maps[name], part, shape=needs.shapes[name])
            result.add(part, value_BCS, fresh=max(0, fresh - part.start[0]))
        fresh = lead(step)  # before it, this row of the kernel lies beyond the map


def _laid(
    chain: Chain, needs: Needs, turns: Turns, kind: type[FeatureMap]
) -> dict[str, FeatureMap]:
    """All maps, empty, in one block of memory but for the logits, which are on the device."""
    layout, weight = Layout.of(chain, needs, turns), chain.weight
    block = kind.memory(layout.size, like=weight)
    maps: dict[str, FeatureMap] = {}
    for name, height in turns.heights.items():
        size = height * row_size(chain, needs, name)
        own = name == chain.logits
        memory = weight.new_empty(size) if own else block[layout.starts[name] :][:size]
        array_BSC = memory.view(1, height, *needs.regions[name].shape[1:], chain.channels[name])
        maps[name] = kind.empty(array_BSC, needs.regions[name], device=weight.device)
    return maps


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
        index: tuple[Any, ...] = (..., *kept.slices(within=window))
        if last.layer == "relu" and last.scratch and result.near:  # with the copy, in one
            torch.clamp_min(values[last.inputs[0]][index], 0, out=result.view(kept))
        else:
            value_BCS = _apply(last, window, values=values, maps=maps, needs=needs)
            result.write(kept, value_BCS[index])


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
        return step.layer.over(source.read_all()).expand(-1, -1, *window.shape)
    if isinstance(step.layer, Gate):
        source = maps[step.inputs[0]]
        return source.read(window) * step.layer.over(source.read_all())
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
    if isinstance(layer, Pool):
        return _slid(layer, source, window, shape=shape)
    bands = row_bands(layer.slide, window, shape)
    parts = [_slid(without_idle_taps(layer, w, shape), source, w, shape=shape) for w in bands]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _slid(layer: Convolution | Pool, source: FeatureMap, window: Region, *, shape: Shape) -> Tensor:
    reads = layer.slide.reads(window)
    around = window
    if set(layer.slide.stride) == {1}:  # what is computed follows what is read
        around = window.grow(source.beside(reads.clip(shape)))
        reads = layer.slide.reads(around)
    inside = reads.clip(shape)
    lacks = [
        (b - a, c - d)
        for a, b, c, d in zip(reads.start, inside.start, reads.stop, inside.stop, strict=True)
    ]
    padding = tuple(
        own_padding(ends, side, stride)
        for ends, side, stride in zip(lacks, around.shape, layer.slide.stride, strict=True)
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
    # What is padded at both ends for one of them begins with places before the first.
    more = (max(0, own - ends[0]) for ends, own in zip(lacks, padding, strict=True))
    kept: tuple[Any, ...] = (
        ...,
        *(
            slice(n + side.start, n + side.stop)
            for n, side in zip(more, window.slices(within=around), strict=True)
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
