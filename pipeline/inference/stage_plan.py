"""What each stage of a tile must compute, and what it costs: arithmetic, nothing runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.domain import Region, Shape
from pipeline.models.context_pool import WindowMean
from pipeline.models.frame import Frame
from pipeline.models.stages import Chain, Step


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


def stage_work(chain: Chain, read: Region, *, scored: Region, shape: Shape) -> int:
    """Multiply-adds of the convolutions of one tile, in a padded scene of ``shape`` px.

    A scene's own work, against which halo work is counted, is that of one tile that is the scene.
    """
    regions = _needs(chain, read, scored=scored, shape=shape).regions
    return sum(stage.work * regions[stage.name].size for stage in chain.stages)


def _needs(chain: Chain, read: Region, *, scored: Region, shape: Shape) -> Needs:
    coarse = coarse_region(read, scored=scored, stride=chain.stride)
    return Needs.of(chain, read.shape, frame=Frame.of(read, shape=shape), coarse=coarse)


def _reads(step: Step, region: Region, shape: Shape, frame: Frame) -> Region:
    """What the step needs of a map of ``shape`` for ``region`` of its output."""
    if isinstance(step.layer, WindowMean):
        return step.layer.windows(region, size=shape, frame=frame).reads
    return step.slide.reads(region).clip(shape) if step.slide else region
