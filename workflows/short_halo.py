"""``--halo auto:TOL``: the shortest halo with the labels of the exact one, as measured.

A trained network uses less than it could reach, how much less only measuring shows. Windows in the
corners of real tiles are predicted twice, once with all the context that the network can reach
and once cut off where a tile with a short halo would end, and their labels compared.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.domain import Halo, Pass, Reach, Region
from pipeline.errors import PlanError
from pipeline.inference.average import Logits
from pipeline.inference.normalise import normalise
from pipeline.inference.padding import read_padded
from pipeline.models.frame import Frame
from pipeline.models.input_spec import Scaling
from pipeline.ports import Source
from pipeline.stitching.bound import upper_bound
from pipeline.stitching.keep_core import keep_core

log = logging.getLogger(__name__)

SIDE = {2: 128, 3: 32}
"""Side of a window, in pixels, by number of axes."""

FEWEST, MOST = 4, 64
"""Windows that are looked at."""

ENOUGH = 5.0
"""Pixels that may differ in what must be looked at: with none the bound is 3 of them."""

SHARES = (0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
"""Of the exact halo: what is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HaloTrial:
    """How a halo fared."""

    halo: int
    """In pixels, on every side."""

    differ: int
    """Labels unlike those of the exact halo, before any CRF."""

    pixels: int
    """All that were compared; all lie in the corner of a tile, where a short halo shows most."""

    upper_95: float
    """What the share of labels that differ lies below in 95 of 100 such samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corner:
    """A window in a corner of a tile."""

    window: Region
    number: int
    """Of the tile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Predicts windows of a scene with more or less context."""

    source: Source
    channels: Sequence[int]
    scaling: Scaling
    predictor: Logits

    sweep: Pass
    """With the exact reach, without the CRF's halo."""

    def corners(self, count: int) -> list[Corner]:
        """Up to ``count`` windows, at least half of each valid; fewer where there are no more."""
        found: list[Corner] = []
        for corner in _corners(self.sweep, most=8 * count):
            if len(found) == count:
                break
            if self.source.read(corner.window).valid_S.mean() >= 0.5:
                found.append(corner)
        return found

    def labels(self, corner: Corner, reach: Reach) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Labels of a window as its tile with this ``reach`` gives them, and its valid mask; (*S).

        Only what the window can see of the tile is read.
        """
        sweep, window = self.sweep, corner.window
        shape = sweep.grid.padded_shape
        seen = sweep.reach.read(window.align(sweep.grid.stride).clip(shape), shape=shape)
        read = seen & replace(sweep, reach=reach).tile(corner.number).read
        block = read_padded(self.source, read)
        image_CS = normalise(block.bands(self.channels), self.scaling)
        frame = Frame.of(read, shape=shape)
        logits_KS = self.predictor.logits(image_CS, frame, scored=window)
        valid_S = keep_core(block.valid_S, core=window, within=read)
        return logits_KS.argmax(dim=0).cpu().numpy(), valid_S


def shortest_halo(sampler: Sampler, *, tolerance: float) -> HaloTrial | None:
    """The shortest halo that is tried whose labels differ in at most ``tolerance`` of the pixels.

    The bound of the share must lie within the tolerance, not the share alone. None where only the
    exact halo does, or nothing is to be seen: no tile borders another, or no pixel is valid.

    Raises:
        PlanError: a tolerance that so many windows cannot show.
        SourceReadError: from the source.
    """
    ndim, exact = len(sampler.sweep.grid.shape), sampler.sweep.reach.halo_with_window.largest
    pixels = SIDE[ndim] ** ndim
    needed = math.ceil(min(ENOUGH / tolerance / pixels, MOST + 1))
    if needed > MOST:
        raise PlanError(
            f"--halo auto:{tolerance:g}: {MOST} windows can show {ENOUGH / MOST / pixels:.1g};"
            " ask for that much, or for the exact halo"
        )
    corners = sampler.corners(max(needed, FEWEST))
    if not corners:
        return None
    wanted = [sampler.labels(corner, sampler.sweep.reach)[0] for corner in corners]
    trials: list[HaloTrial] = []
    stride = sampler.sweep.grid.stride
    halos = sorted({-(-round(exact * share) // stride) * stride for share in SHARES})
    while halos:  # what a short one meets, longer ones meet as well
        middle = len(halos) // 2
        trial = _trial(sampler, halos[middle], corners, wanted)
        log.info("halo %d px: %d of %d labels differ", trial.halo, trial.differ, trial.pixels)
        if trial.upper_95 <= tolerance:
            trials.append(trial)
            halos = halos[:middle]
        else:
            halos = halos[middle + 1 :]
    return trials[-1] if trials else None


def short_reach(reach: Reach, halo: int) -> Reach:
    """What is read with a halo of so many pixels, rounded up to the stride.

    Windows of image pooling stay what they are; the trunk's own context around them is left out.
    Features whose mean is taken over the scene have this halo too.
    """
    short = Halo.uniform(halo, ndim=len(reach.halo.before)).round_up(reach.stride)
    none = Halo.uniform(0, ndim=len(reach.halo.before))
    window = reach.window and replace(reach.window, outer=none)
    return replace(reach, halo=short, window=window, pooled=reach.pooled and short)


def _trial(
    sampler: Sampler, halo: int, corners: Sequence[Corner], wanted: Sequence[NDArray[np.intp]]
) -> HaloTrial:
    reach, differ, pixels = short_reach(sampler.sweep.reach, halo), 0, 0
    for corner, wanted_S in zip(corners, wanted, strict=True):
        labels_S, valid_S = sampler.labels(corner, reach)
        differ += int((labels_S != wanted_S)[valid_S].sum())
        pixels += int(valid_S.sum())
    return HaloTrial(halo=halo, differ=differ, pixels=pixels, upper_95=upper_bound(differ, pixels))


def _corners(sweep: Pass, *, most: int) -> Iterator[Corner]:
    """Windows where tiles meet, one in the corner of each, in an order that is random but fixed.

    Along an axis that is not cut, the middle of the scene.
    """
    grid, side = sweep.grid, SIDE[len(sweep.grid.shape)]
    borders = [
        range(tile, length, tile) for length, tile in zip(grid.shape, grid.tile, strict=True)
    ]
    if not any(borders):
        return
    counts = [2 * len(places) or 1 for places in borders]
    total = math.prod(counts)
    for place in random.Random(0).sample(range(total), min(total, most)):  # noqa: S311
        start, number = [], 0
        for axis, places in enumerate(borders):
            place, choice = divmod(place, counts[axis])
            # The first pixels of the tile behind a border, or the last of the one before it.
            index, behind = divmod(choice, 2)
            first = places[index] - side * (1 - behind) if places else grid.shape[axis] // 2 - side
            start.append(max(0, first))
            number = number * grid.counts[axis] + (index + behind if places else 0)
        window = Region(tuple(start), tuple(a + side for a in start))
        yield Corner(window=window & grid.core(number), number=number)
