"""What each stage of a tile must compute, and what it costs: arithmetic, nothing runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.domain import Region, Shape
from pipeline.models.context_pool import WindowMean
from pipeline.models.frame import Frame
from pipeline.models.scene_mean import OwnMean
from pipeline.models.stages import Chain, Convolution, Stage, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The part of every map that a tile needs: it shrinks from ``read`` to ``scored``.

    Regions are in features of their map, from the first that the input gives.
    """

    frame: Frame
    """Where the input lies."""

    shapes: Mapping[str, Shape]
    """Shape that each map would have over all of the input."""

    regions: Mapping[str, Region]

    @classmethod
    def of(cls, chain: Chain, size: Shape, *, frame: Frame, coarse: Region) -> Needs:
        """For the logits ``coarse`` of an input of ``size`` px that lies at ``frame``.

        Raises:
            RegionError: the input holds no whole window of image pooling.
        """
        shapes = chain.shapes(size)
        regions = {chain.logits: coarse}
        for stage in reversed(chain.stages):
            for step, name in stage.reads():
                part = _reads(step, regions[stage.name], shapes[name], frame)
                regions[name] = part | regions.get(name, part)
        return cls(frame=frame, shapes=shapes, regions=regions)


def coarse_region(read: Region, *, scored: Region, stride: int) -> Region:
    """The logits at the output stride, from the first that ``read`` gives, that ``scored`` needs.

    Linear upsampling reads one beyond each side. Raises RegionError where ``read`` does not hold
    ``scored``.
    """
    local = scored.slices(within=read)
    return Region(
        tuple(part.start // stride - 1 for part in local),
        tuple(-(-part.stop // stride) + 1 for part in local),
    ).clip(tuple(side // stride for side in read.shape))


def feature_region(read: Region, *, core: Region, stride: int) -> Region:
    """The features of ``core``, which lies on the stride, from the first that ``read`` gives."""
    part = core.slices(within=read)
    return Region(
        tuple(side.start // stride for side in part), tuple(side.stop // stride for side in part)
    )


def needs_of(chain: Chain, read: Region, *, scored: Region, shape: Shape) -> Needs:
    """What a tile that reads ``read`` of a padded scene of ``shape`` px needs for ``scored``."""
    coarse = coarse_region(read, scored=scored, stride=chain.stride)
    return Needs.of(chain, read.shape, frame=Frame.of(read, shape=shape), coarse=coarse)


def stage_work(chain: Chain, needs: Needs) -> int:
    """Multiply-adds of the convolutions of one tile.

    A scene's own work, against which halo work is counted, is that of one tile that is the scene.
    """
    return sum(stage.work * needs.regions[stage.name].size for stage in chain.stages)


def stage_bytes(chain: Chain, needs: Needs, *, window: int, itemsize: int) -> int:
    """Peak bytes of the maps held at once, with the scratch of one window; logits left out.

    Args:
        chain: the network's stages.
        needs: of the tile.
        window: side of a window, in features.
        itemsize: bytes of a number in the maps.
    """
    image = math.prod(needs.shapes[chain.image]) * chain.bands
    held = {chain.image: image}
    peak = 0
    for stage in chain.stages:
        if stage.overwrites is None:
            held[stage.name] = needs.regions[stage.name].size * stage.channels
        else:  # the memory keeps the size it had
            held[stage.name] = held.pop(stage.overwrites)
        scratch = _scratch(stage, needs, channels=chain.channels, window=window)
        peak = max(peak, sum(held.values()) + scratch)
        for name in set(stage.frees) - {stage.overwrites, chain.image}:
            del held[name]  # the caller holds the image to the end
    return peak * itemsize


def _scratch(stage: Stage, needs: Needs, *, channels: Mapping[str, int], window: int) -> int:
    """Numbers that one window takes beside the maps."""
    region = needs.regions[stage.name]
    most = region.size if stage.whole else window**region.ndim
    block = Region.whole(row_block(region.shape, most))
    made = sum(step.channels for step in stage.steps if not step.scratch) * block.size
    # A part of a map that is padded, or narrower than the map, is copied; weights are reordered.
    copies = [
        step.slide.reads(block).size * channels[step.inputs[0]]
        for step in stage.steps
        if step.slide is not None
    ]
    weights = [s.layer.weight.numel() for s in stage.steps if isinstance(s.layer, Convolution)]
    return made + max(copies, default=0) + max(weights, default=0)


def row_block(shape: Shape, most: int) -> Shape:
    """The box of at most ``most`` places that cuts ``shape`` into runs of whole rows or planes.

    >>> row_block((100, 50), 120), row_block((100, 50), 30), row_block((9, 5, 4), 45)
    ((2, 50), (1, 30), (2, 5, 4))
    """
    return tuple(
        max(1, min(side, most // math.prod(shape[axis + 1 :]))) for axis, side in enumerate(shape)
    )


def _reads(step: Step, region: Region, shape: Shape, frame: Frame) -> Region:
    """What the step needs of a map of ``shape`` for ``region`` of its output."""
    if isinstance(step.layer, WindowMean):
        return step.layer.windows(region, size=shape, frame=frame).reads
    if isinstance(step.layer, OwnMean):
        return Region.whole(shape)
    return step.slide.reads(region).clip(shape) if step.slide else region
