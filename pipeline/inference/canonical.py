"""A network run over canonical windows: boxes of the scene, the same whichever tile asks.

A window is computed whole, in memory of its own, from inputs that hold zeros where this tile needs
nothing. What the tile does need stands at the same place of a box of the same shape, whichever
tile asks, and is computed from the same numbers in the same order: the same bits. No other place
is kept.

Axes in array names: B batch, C channel, K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.domain import Halo, Region, Shape
from pipeline.errors import RegionError
from pipeline.inference.feature_map import FeatureMap
from pipeline.inference.stage_plan import Needs, coarse_place, coarse_region
from pipeline.inference.staged import Picture, parts_of, run
from pipeline.models.chain import Chain
from pipeline.models.context_pool import WindowMean
from pipeline.models.frame import Frame
from pipeline.models.geometry import Scale

CANONICAL_PX = {2: 256, 3: 32}
"""Side of a canonical window in pixels, by number of axes: a multiple of every output stride."""


@dataclass(slots=True)
class BoxMap(FeatureMap):
    """Features of a region of the scene, read as boxes that may reach outside it."""

    def read(self, region: Region) -> Tensor:
        """(1, C, *S), a new tensor, zero outside this map.

        Never a view: kernels take other ways, and round otherwise, for memory with other strides.
        """
        box_BSC = self.array_BSC.new_zeros((1, *region.shape, self.array_BSC.shape[-1]))
        box_BCS = box_BSC.movedim(-1, 1)
        held = region & self.region
        if held.size:  # else it is a part of a window in which this tile needs nothing
            index: tuple[Any, ...] = (..., *held.slices(within=region))
            box_BCS[index] = self.view(held)
        return box_BCS

    def beside(self, region: Region) -> Halo:
        """Nothing: what is held depends on the tile."""
        return Halo.uniform(0, ndim=region.ndim)


class CanonicalNetwork:
    """The stages of a network, run over canonical windows."""

    def __init__(self, chain: Chain, *, side_px: int) -> None:
        """Run ``chain`` over windows of ``side_px``, a multiple of the output stride."""
        steps = (step.layer for stage in chain.stages for step in stage.steps)
        over_all = [a for a in steps if isinstance(a, WindowMean) and a.window is None]
        assert not over_all, "a mean over the tile is the tile's"
        self.chain, self.side_px = chain, side_px

    def coarse_logits(self, image_BCS: Picture, frame: Frame, coarse: Region) -> Tensor:
        """As ``StagedNetwork.coarse_logits``.

        Raises:
            RegionError: the image does not hold all that ``coarse`` needs.
        """
        read = Region.whole(tuple(image_BCS.shape[2:])).move(frame.origin)
        wanted = coarse.move(coarse_place(frame.origin, upsample=self.chain.upsample))
        needs = Needs.canonical(self.chain, frame.shape, coarse=wanted, side_px=self.side_px)
        needed = needs.regions[self.chain.image]
        if needed not in read:
            raise RegionError(f"canonical windows need {needed} of the scene, the input is {read}")
        image = parts_of(image_BCS, read)
        return run(self.chain, needs, image, window=self.side_px, kind=BoxMap).view(wanted)


def upsampled(
    layer: Callable[[Tensor], Tensor],
    coarse: BoxMap,
    scored: Region,
    *,
    side_px: int,
    shape: Shape,
    upsample: Scale,
) -> Tensor:
    """Logits of ``scored``, a region of a padded scene of ``shape`` px: (K, *S) float32, new.

    Interpolated window by window too: torch takes another kernel for a box of another size.
    """
    classes, whole = coarse.array_BSC.shape[-1], Region.whole(shape)
    result_KS = coarse.array_BSC.new_empty((classes, *scored.shape), dtype=torch.float32)
    around = scored.align(side_px).clip(shape)
    for window in around.blocks((side_px,) * scored.ndim):
        box, kept = coarse_region(whole, scored=window, upsample=upsample), window & scored
        window_BKS = layer(coarse.read(box).float().contiguous())
        part: tuple[Any, ...] = (..., *kept.slices(within=upsample.gives(box)))
        place: tuple[Any, ...] = (..., *kept.slices(within=scored))
        result_KS[place] = window_BKS[0][part]
    return result_KS
