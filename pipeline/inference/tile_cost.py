"""What a tile costs, counted before anything runs: arithmetic, and bytes where it is computed."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.domain import Region, Shape, Tile
from pipeline.inference.stage_plan import needs_of, stage_bytes, stage_work
from pipeline.models.stages import Chain

_FLOAT32 = 4
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
    """Side of a window, in features."""

    itemsize: int
    """Bytes of a number in the network."""

    pixel_bytes: int
    """Bytes of a pixel as the source gives it, bands that the network does not take included."""

    shape: Shape
    """The padded scene, in pixels."""

    def of(self, tile: Tile) -> TileCost:
        """Cost of one tile. Raises RegionError where its input holds no window of pooling."""
        chain = self.chain
        needs = needs_of(chain, tile.read, scored=tile.scored, shape=self.shape)
        maps = stage_bytes(chain, needs, window=self.window, itemsize=self.itemsize)
        image = tile.read.size * chain.bands * self.itemsize
        fine = needs.regions[chain.logits].size * chain.stride**tile.read.ndim
        upsampled = fine * self.classes * _FLOAT32
        # Beside the tile that the device has: one that waits for it, one that is being read, of
        # which the bands are picked in a copy, and logits that wait to be refined or written.
        blocks = 3 * tile.read.size * (self.pixel_bytes + 1)
        floats = tile.read.size * (chain.bands + 2) * _FLOAT32
        kept = tile.scored.size * self.classes * _FLOAT32 + tile.core.size * _LABEL
        return TileCost(
            work=stage_work(chain, needs),
            device_bytes=max(maps, image + upsampled),
            host_bytes=blocks + floats + kept,
        )

    @property
    def scene_work(self) -> int:
        """Multiply-adds of one pass over the padded scene, which halo work is measured against."""
        whole = Region.whole(self.shape)
        return stage_work(self.chain, needs_of(self.chain, whole, scored=whole, shape=self.shape))
