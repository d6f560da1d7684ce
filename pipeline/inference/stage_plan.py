"""What each stage of a tile must compute, and what it costs: arithmetic, nothing runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pipeline.domain import Halo, Region, Shape
from pipeline.inference.zoom import NATURAL, Zoom
from pipeline.models.chain import Chain, Gate, Stage, Step
from pipeline.models.context_pool import WindowMean
from pipeline.models.frame import Frame
from pipeline.models.geometry import Scale, Slide
from pipeline.models.scene_mean import OwnMean

_FEW = 8
"""A window's side over what it may compute in vain at its end, rather than copy what it reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The part of every map that a tile needs: it shrinks from ``read`` to ``scored``.

    Regions are in features of their map, from the first that the input gives; with canonical
    windows, from the scene's first.
    """

    frame: Frame
    """Where the input lies."""

    shapes: Mapping[str, Shape]
    """Shape that each map would have over all of the input, or of the scene."""

    regions: Mapping[str, Region]

    sides: Mapping[str, Shape] | None = None
    """Sides of the canonical windows of each map, in its features; None: runs of rows instead."""

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
                part = needed_of(step, regions[stage.name], shapes[name], frame)
                regions[name] = part | regions.get(name, part)
        return cls(frame=frame, shapes=shapes, regions=regions)

    @classmethod
    def canonical(cls, chain: Chain, shape: Shape, *, coarse: Region, side_px: int) -> Needs:
        """For the logits ``coarse`` of a padded scene, in windows that are the scene's own.

        Args:
            chain: the network's stages.
            shape: of the padded scene, in px.
            coarse: in features of the scene.
            side_px: of a window, a multiple of the output stride: the same pixels in every map.
        """
        ndim = len(shape)
        needs = cls.of(chain, shape, frame=Frame((0,) * ndim, shape), coarse=coarse)
        end = chain.endpoint
        shapes = chain.shapes((side_px + end,) * ndim)
        sides = {name: tuple(side - end for side in shape) for name, shape in shapes.items()}
        return replace(needs, sides=sides)

    def computed(self, stage: Stage) -> Region:
        """What is computed of a stage: what is needed, or the canonical windows that hold it."""
        region = self.regions[stage.name]
        if self.sides is None or stage.whole:
            return region
        return region.align(self.sides[stage.name]).clip(self.shapes[stage.name])


def coarse_region(read: Region, *, scored: Region, upsample: Scale) -> Region:
    """The coarse logits, from the first that ``read`` gives, that ``scored`` needs.

    Raises RegionError where ``read`` does not hold ``scored``.
    """
    part = scored.slices(within=read)
    local = Region(tuple(side.start for side in part), tuple(side.stop for side in part))
    return upsample.reads(local).clip(coarse_shape(read.shape, upsample=upsample))


def coarse_shape(size: Shape, *, upsample: Scale) -> Shape:
    """How many coarse logits an input of ``size`` px, a valid one, gives per axis."""
    end, rows = int(upsample.align_corners), zip(size, upsample.up, upsample.down, strict=True)
    return tuple((side - end) * down // up + end for side, up, down in rows)


def coarse_place(pixel: tuple[int, ...], *, upsample: Scale) -> tuple[int, ...]:
    """The coarse logit at a pixel that lies on the stride, per axis."""
    rows = zip(pixel, upsample.up, upsample.down, strict=True)
    return tuple(place * down // up for place, up, down in rows)


def feature_region(read: Region, *, core: Region, stride: int) -> Region:
    """The features of ``core``, which lies on the stride, from the first that ``read`` gives."""
    part = core.slices(within=read)
    return Region(
        tuple(side.start // stride for side in part),
        tuple(-(-side.stop // stride) for side in part),
    )


def needs_of(
    chain: Chain,
    read: Region,
    *,
    scored: Region,
    shape: Shape,
    canonical_px: int | None = None,
    zoom: Zoom = NATURAL,
) -> Needs:
    """What a tile that reads ``read`` of a padded scene of ``shape`` px needs for ``scored``.

    With ``canonical_px``, the side of canonical windows, whole windows of it are computed. The
    needs are of the scene as ``zoom`` makes it.
    """
    upsample, frame = zoom.upsample(chain.upsample), Frame.of(read, shape=shape)
    frame = zoom.frame(frame, like=chain.upsample)
    if canonical_px is not None:
        coarse = coarse_region(Region.whole(shape), scored=scored, upsample=upsample)
        return Needs.canonical(chain, frame.shape, coarse=coarse, side_px=canonical_px)
    coarse = coarse_region(read, scored=scored, upsample=upsample)
    size = zoom.scale(chain.upsample).shape(read.shape)
    return Needs.of(chain, size, frame=frame, coarse=coarse)


def stage_work(chain: Chain, needs: Needs) -> int:
    """Multiply-adds of the convolutions of one tile.

    A scene's own work, against which halo work is counted, is that of one tile that is the scene.
    """
    return sum(stage.work * needs.computed(stage).size for stage in chain.stages)


def row_block(shape: Shape, most: int) -> Shape:
    """The box of at most ``most`` places that cuts ``shape`` into runs of whole rows or planes.

    >>> row_block((100, 50), 120), row_block((100, 50), 30), row_block((9, 5, 4), 45)
    ((2, 50), (1, 30), (2, 5, 4))
    """
    return tuple(
        max(1, min(side, most // math.prod(shape[axis + 1 :]))) for axis, side in enumerate(shape)
    )


def needed_of(step: Step, region: Region, shape: Shape, frame: Frame) -> Region:
    """What the step needs of a map of ``shape`` for ``region`` of its output."""
    ends = enumerate(zip(region.start, region.stop, strict=True))
    spans = (needed_span(step, axis, a, b, shape, frame) for axis, (a, b) in ends)
    start, stop = zip(*spans, strict=True)
    return Region(start, stop)


def needed_span(
    step: Step, axis: int, first: int, stop: int, shape: Shape, frame: Frame
) -> tuple[int, int]:
    """As ``needed_of``, of ``[first, stop)`` along one axis."""
    if isinstance(step.layer, WindowMean):
        return step.layer.span(axis, first, stop, size=shape, frame=frame)
    if isinstance(step.layer, (OwnMean, Gate)):
        return 0, shape[axis]
    if step.geometry is None:
        return first, stop
    start, end = step.geometry.span(axis, first, stop)
    start = min(max(start, 0), shape[axis])
    return start, max(min(end, shape[axis]), start)


def own_padding(lacks: tuple[int, int], side: int, stride: int) -> int:
    """What a layer pads itself, without a copy, at both ends of an axis that lacks so much.

    At an end that lacks less it computes places that are cut off again, where those are few.
    """
    few = stride == 1 and _FEW * max(lacks) <= side
    return max(lacks) if few else min(lacks)


def beside(region: Region, held: Region) -> Halo:
    """What of whole rows (or planes) ``held`` lies beside ``region``, where that is little."""
    rows = Region((region.start[0], *held.start[1:]), (region.stop[0], *held.stop[1:]))
    if _FEW * (rows.size - region.size) > region.size:
        rows = region
    return Halo(
        tuple(a - b for a, b in zip(region.start, rows.start, strict=True)),
        tuple(b - a for a, b in zip(region.stop, rows.stop, strict=True)),
    )


def row_bands(slide: Slide, window: Region, shape: Shape) -> list[Region]:
    """A window of a convolution's output, cut where another tap meets rows of the map.

    So each band's taps meet rows, or padding alone: what meets both is copied to be padded.
    """
    first, stop = window.start[0], window.stop[0]
    start, end = slide.span(0, first, stop)
    lacks = max(0, -start), max(0, end - shape[0])
    if slide.stride[0] > 1 or own_padding(lacks, stop - first, 1) == max(lacks):
        return [window]
    taps = [slide.padding[0] - tap * slide.dilation[0] for tap in range(slide.kernel[0])]
    cuts = {cut for tap in taps for cut in (tap, shape[0] + tap) if first < cut < stop}
    ends = sorted({first, stop} | cuts)
    return [
        Region((a, *window.start[1:]), (b, *window.stop[1:])) for a, b in itertools.pairwise(ends)
    ]


def block_of(stage: Stage, needs: Needs, window: int) -> Shape:
    """Shape of the boxes of a stage's output that are computed at once.

    Runs of whole rows, as large as a box of side ``window``, or canonical windows; all of it where
    a mean over all of it is taken.
    """
    region = needs.computed(stage)
    if stage.whole:
        return region.shape
    if needs.sides is None:
        return row_block(region.shape, window**region.ndim)
    pairs = zip(needs.sides[stage.name], region.shape, strict=True)
    return tuple(min(side, length) for side, length in pairs)
