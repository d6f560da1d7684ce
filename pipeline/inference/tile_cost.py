"""What a tile costs, counted before anything runs: arithmetic, and bytes where it is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from pipeline.domain import Region, Shape, Tile
from pipeline.inference.map_layout import stage_bytes
from pipeline.inference.stage_plan import (
    Needs,
    feature_region,
    needs_of,
    stage_work,
)
from pipeline.models.chain import Chain
from pipeline.models.frame import Frame
from pipeline.models.scene_mean import GivenMean
from pipeline.models.scene_stages import pooled_by, pooled_chain

_FLOAT32 = 4
_HELD = 3.2
"""Bytes held, at most, over those of the widest stage, in and out, by a network that runs as one:
1.8 (ResNet-50, fp32) to 3.2 (slim, bf16) measured on the CPU."""

_SCORES = 5
"""Probabilities of a core that are held while they are written, with the logits they are of: 3.7
(float16) to 4.9 (uint8) measured on the CPU."""

_LABEL = 12
"""Bytes per pixel of the argmax, which counts in 8, and of labels in two stages of a worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileCost:
    """Of one tile in one worker."""

    work: int
    """Multiply-adds of the convolutions."""

    device_bytes: int
    """Peak of image, maps and logits where the network runs, its weights left out."""

    host_bytes: int
    """Peak of what reader, CRF and writer hold at the same time, in the host's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """What costs are counted from."""

    chain: Chain
    classes: int

    window: int
    """Side of a window, in features, where windows are runs of rows."""

    canonical_px: int | None
    """Side of canonical windows, in pixels; None where windows are runs of rows."""

    itemsize: int
    """Bytes of a number in the network."""

    pixel_bytes: int
    """Bytes of a pixel as the source gives it, bands that the network does not take included."""

    shape: Shape
    """The padded scene, in pixels."""

    scores: bool
    """Whether probabilities are written as well."""

    passes: int
    """Times that the network sees a tile."""

    def of(self, tile: Tile) -> TileCost:
        """Cost of one tile. Raises RegionError where its input holds no window of pooling."""
        chain = self.chain
        needs = needs_of(
            chain,
            tile.read,
            scored=tile.scored,
            shape=self.shape,
            canonical_px=self.canonical_px,
        )
        maps = stage_bytes(chain, needs, window=self.window, itemsize=self.itemsize)
        image = tile.read.size * chain.bands * self.itemsize
        fine = chain.upsample.gives(needs.regions[chain.logits]).size
        upsampled = fine * self.classes * _FLOAT32
        kept = kept_bytes(tile, classes=self.classes, scores=self.scores)
        mean = mean_bytes(tile.scored, classes=self.classes, passes=self.passes)
        return TileCost(
            work=self.passes * stage_work(chain, needs),
            device_bytes=max(maps, image + upsampled) + mean,
            host_bytes=self._read_bytes(tile) + kept,
        )

    def of_sums(self, tile: Tile) -> TileCost:
        """Cost of one tile of a context pass; the sums themselves are few."""
        chain = pooled_chain(self.chain)
        side_px = self.canonical_px
        around = tile.read if side_px is None else Region.whole(self.shape)
        coarse = feature_region(around, core=tile.scored, stride=chain.stride)
        if side_px is None:
            frame = Frame.of(tile.read, shape=self.shape)
            needs = Needs.of(chain, tile.read.shape, frame=frame, coarse=coarse)
        else:
            needs = Needs.canonical(chain, self.shape, coarse=coarse, side_px=side_px)
        return TileCost(
            work=stage_work(chain, needs),
            device_bytes=stage_bytes(chain, needs, window=self.window, itemsize=self.itemsize),
            host_bytes=self._read_bytes(tile),
        )

    def of_sample(self, tile: Tile) -> TileCost:
        """Cost of one sample of the certificate, over which the network runs as one."""
        chain, size = self.chain, tile.read.shape
        shapes, channels = chain.shapes(size), chain.channels
        widest = max(
            sum(math.prod(shapes[name]) * channels[name] for name in {n for _, n in stage.reads()})
            + max(step.channels for step in stage.steps) * math.prod(shapes[stage.name])
            for stage in chain.stages
        )
        whole = Region.whole(size)
        frame = Frame.of(tile.read, shape=self.shape)
        coarse = Region.whole(shapes[chain.logits])
        fine = 2 * whole.size * self.classes * _FLOAT32
        work = stage_work(chain, Needs.of(chain, size, frame=frame, coarse=coarse))
        mean = 2 * mean_bytes(whole, classes=self.classes, passes=self.passes)  # in float64
        return TileCost(
            work=self.passes * work,
            device_bytes=int(max(_HELD * widest * self.itemsize, fine)) + mean,
            host_bytes=self._read_bytes(tile),
        )

    def given_the_mean(self) -> CostModel:
        """Costs of the pass after a context pass; ``scene_work`` is then without pooling."""
        return replace(self, chain=pooled_by(self.chain, GivenMean(np.empty(0))))

    def _read_bytes(self, tile: Tile) -> int:
        return read_bytes(
            tile, bands=self.chain.bands, pixel_bytes=self.pixel_bytes, passes=self.passes
        )

    @property
    def scene_work(self) -> int:
        """Multiply-adds of one pass over the padded scene, which halo work is measured against."""
        whole = Region.whole(self.shape)
        needs = needs_of(self.chain, whole, scored=whole, shape=self.shape)
        return self.passes * stage_work(self.chain, needs)


def read_bytes(tile: Tile, *, bands: int, pixel_bytes: int, passes: int) -> int:
    """Bytes of what is read, in the host's memory.

    Of three tiles: on the device, being refined, and being read, of which the bands are picked in
    a copy. The image is kept for further passes.
    """
    images = 1 + (passes > 1)
    return tile.read.size * (4 * (pixel_bytes + 1) + (images * bands + 2) * _FLOAT32)


def mean_bytes(region: Region, *, classes: int, passes: int) -> int:
    """Bytes of the mean of several passes and of what is made to add one to it; 0 for one."""
    return 3 * (passes > 1) * region.size * classes * _FLOAT32


def kept_bytes(tile: Tile, *, classes: int, scores: bool) -> int:
    """Bytes of logits that are refined and written while the next are computed, in the host's."""
    kept = tile.scored.size * classes * _FLOAT32 + tile.core.size * _LABEL
    return kept + scores * _SCORES * tile.core.size * classes * _FLOAT32
