"""What a tile costs, counted before anything runs: arithmetic, and bytes where it is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from pipeline.domain import Region, Shape, Tile, TileCost
from pipeline.inference.average import Average
from pipeline.inference.live_values import HEAP_BYTES
from pipeline.inference.map_layout import StageBytes
from pipeline.inference.row_sums import with_row_sums
from pipeline.inference.stage_plan import (
    Needs,
    feature_region,
    needs_of,
    stage_work,
)
from pipeline.inference.zoom import Zoom
from pipeline.models.chain import Chain
from pipeline.models.frame import Frame
from pipeline.models.scene_mean import GivenMean
from pipeline.models.scene_stages import pooled_by, pooled_chain

_FLOAT32 = 4
_SCORES = 5
"""Probabilities of a core that are held while they are written, with the logits they are of: 3.7
(float16) to 4.9 (uint8) measured on the CPU."""

_LABEL = 8
"""Bytes per pixel of labels in two stages of a worker, and while they are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """What costs are counted from."""

    chain: Chain

    live_px: float
    """Bytes per pixel of the values that live at once where the network runs as one, in float32."""

    classes: int

    window: int
    """Side of a window, in features, where windows are runs of rows."""

    hosted: bool
    """Whether maps are held in the memory of the host."""

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

    guided: bool
    """Whether a CRF looks at the pixels of a tile."""

    average: Average

    def of(self, tile: Tile) -> TileCost:
        """Cost of one tile. Raises RegionError where its input holds no window of pooling."""
        kept = kept_bytes(tile, classes=self.classes, scores=self.scores)
        mean = mean_bytes(tile.scored, classes=self.classes, average=self.average)
        zooms = [self._of_zoom(zoom, tile) for zoom in self.average.zooms]
        return TileCost(
            work=sum(zoom.work for zoom in zooms),
            device_bytes=max(zoom.device_bytes for zoom in zooms) + mean,
            host_bytes=max(zoom.host_bytes for zoom in zooms)
            + self._read_bytes(tile, in_bands=self.average.alone)
            + kept,
        )

    def _of_zoom(self, zoom: Zoom, tile: Tile) -> TileCost:
        """Multiply-adds of the passes at a zoom, and what maps and windows of one of them hold."""
        chain = self.chain
        if self.canonical_px is None and self.itemsize == _FLOAT32:
            chain = with_row_sums(chain)
        read = self.average.part(zoom, tile.read, scored=tile.scored, shape=self.shape)
        needs = needs_of(
            chain,
            read,
            scored=tile.scored,
            shape=self.shape,
            canonical_px=self.canonical_px,
            zoom=zoom,
        )
        in_host, on_device = self._stage_bytes(chain, needs)
        size = math.prod(zoom.scale(chain.upsample).shape(read.shape))
        if not zoom.natural:  # it is resized as a whole
            on_device += size * chain.bands * self.itemsize
        coarse = needs.regions[chain.logits]
        fine = zoom.upsample(chain.upsample).gives(coarse).size
        upsampled = (fine + 2 * coarse.size) * self.classes * _FLOAT32
        work = len(self.average.mirrors) * stage_work(chain, needs)
        resized = resized_bytes(zoom, read.size, size, bands=chain.bands)
        return TileCost(
            work=work, device_bytes=max(on_device, upsampled, resized), host_bytes=in_host
        )

    def _stage_bytes(self, chain: Chain, needs: Needs) -> tuple[int, int]:
        """In the memory of the host, and on the device."""
        maps, windows = StageBytes.of(
            chain, needs, window=self.window, itemsize=self.itemsize, hosted=self.hosted
        )
        return (maps, windows) if self.hosted else (0, maps + windows)

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
        in_host, on_device = self._stage_bytes(chain, needs)
        return TileCost(
            work=stage_work(chain, needs),
            device_bytes=on_device,
            host_bytes=in_host + self._read_bytes(tile, in_bands=True),
        )

    def of_sample(self, tile: Tile) -> TileCost:
        """Cost of one sample of the certificate, over which the network runs as one."""
        whole = Region.whole(tile.read.shape)
        mean = 2 * mean_bytes(whole, classes=self.classes, average=self.average)  # in float64
        zooms = [self._of_zoomed_sample(zoom, tile) for zoom in self.average.zooms]
        return TileCost(
            work=sum(work for work, _ in zooms),
            device_bytes=max(held for _, held in zooms) + mean,
            host_bytes=self._read_bytes(tile, in_bands=False),
        )

    def _of_zoomed_sample(self, zoom: Zoom, tile: Tile) -> tuple[int, int]:
        """Multiply-adds of a sample's passes at a zoom, and what the device holds in one."""
        chain = self.chain
        size = zoom.scale(chain.upsample).shape(tile.read.shape)
        frame = zoom.frame(Frame.of(tile.read, shape=self.shape), like=chain.upsample)
        coarse = Region.whole(chain.shapes(size)[chain.logits])
        live = int(self.live_px * math.prod(size) * self.itemsize / _FLOAT32)
        fine = 2 * tile.read.size * self.classes * _FLOAT32
        work = stage_work(chain, Needs.of(chain, size, frame=frame, coarse=coarse))
        resized = resized_bytes(zoom, tile.read.size, math.prod(size), bands=chain.bands)
        held = max(live + min(live, HEAP_BYTES), fine, resized)
        return len(self.average.mirrors) * work, held

    def given_the_mean(self) -> CostModel:
        """Costs of the pass after a context pass; ``scene_work`` is then without pooling."""
        return replace(self, chain=pooled_by(self.chain, GivenMean(np.empty(0))))

    def _read_bytes(self, tile: Tile, *, in_bands: bool) -> int:
        """``in_bands``: whether the network is given the image band by band."""
        image = image_bytes(tile, bands=self.chain.bands, average=self.average)
        return (
            read_bytes(tile, pixel_bytes=self.pixel_bytes, guided=self.guided)
            + (not in_bands) * image
        )

    @property
    def scene_work(self) -> int:
        """Multiply-adds of one pass over the padded scene, which halo work is measured against."""
        whole = Region.whole(self.shape)
        return len(self.average.mirrors) * sum(
            stage_work(
                self.chain,
                needs_of(self.chain, whole, scored=whole, shape=self.shape, zoom=zoom),
            )
            for zoom in self.average.zooms
        )


def resized_bytes(zoom: Zoom, pixels: int, resized: int, *, bands: int) -> int:
    """Bytes of an image of so many ``pixels`` while it is ``resized``: two values for each made."""
    return 0 if zoom.natural else (pixels + 3 * max(pixels, resized)) * bands * _FLOAT32


def read_bytes(tile: Tile, *, pixel_bytes: int, guided: bool) -> int:
    """Bytes of what is read, in the host's memory.

    Of three tiles: on the device, being refined, of which the pixels are kept only to guide a CRF,
    and being read, of which the bands are picked in a copy where not all are wanted.
    """
    return tile.read.size * (3 * (pixel_bytes + 1) + guided * pixel_bytes + 1)


def image_bytes(tile: Tile, *, bands: int, average: Average) -> int:
    """Bytes of an image that is normalised as a whole; its mirror images are copies."""
    images = 1 + (not average.alone)
    return tile.read.size * (images * bands + 2) * _FLOAT32


def mean_bytes(region: Region, *, classes: int, average: Average) -> int:
    """Bytes of the mean of all passes and of what is made to add one to it; 0 where all is one."""
    return 3 * (not average.alone) * region.size * classes * _FLOAT32


def kept_bytes(tile: Tile, *, classes: int, scores: bool) -> int:
    """Bytes of logits that are refined and written while the next are computed, in the host's."""
    kept = tile.scored.size * classes * _FLOAT32 + tile.core.size * _LABEL
    return kept + scores * _SCORES * tile.core.size * classes * _FLOAT32
