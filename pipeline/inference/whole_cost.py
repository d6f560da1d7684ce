"""What a tile costs where the network runs as one: measured once, on a small image.

Axes in array names: B batch, C channel, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.domain import Region, Shape, Tile, TileCost
from pipeline.inference.average import Average
from pipeline.inference.live_values import LiveValues
from pipeline.inference.tile_cost import (
    image_bytes,
    kept_bytes,
    mean_bytes,
    read_bytes,
    resized_bytes,
)
from pipeline.inference.zoom import Zoom
from pipeline.models.custom_network import CustomNetwork

_FLOAT32 = 4
_SIDE = {2: 128, 3: 32}
"""Side of the small image, in pixels, by number of axes; two strides where that is more."""
_SCRATCH = 1.5
"""Bytes held, at most, over those of the values that live at once: what kernels lay out anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a network takes per pixel that it is given, in float32."""

    bands: int

    size: Shape
    """Of the image that it was tried on, in pixels."""

    work_px: float
    """Multiply-adds of convolutions and products of matrices."""

    bytes_px: float
    """Of the values that live at once, image and logits included, weights left out."""


def trial_of(network: CustomNetwork) -> Trial:
    """Run the network over a small image and count. Raises RuntimeError where it does not run."""
    from torch.utils.flop_counter import FlopCounterMode  # brings triton, 0.2 s

    stride, dims = network.stride, network.architecture.dims
    size = (max(2, -(-_SIDE[dims] // stride)) * stride,) * dims
    image_BCS = torch.zeros(1, network.bands, *size)
    values = LiveValues()
    values.hold(image_BCS)
    with torch.no_grad(), FlopCounterMode(display=False) as flops, _Operations(values):
        network.module(image_BCS)
    pixels = math.prod(size)
    return Trial(
        bands=network.bands,
        size=size,
        work_px=flops.get_total_flops() / 2 / pixels,
        bytes_px=values.peak / pixels,
    )


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Holds what operations make: a program calls no functions."""

    def __init__(self, values: LiveValues) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values = values

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._values.hold(result)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeCostModel:
    """What costs of a network that runs as one are counted from."""

    trial: Trial
    classes: int

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
        """Cost of one tile: of all that each pass needs of it."""
        cost = self._of([self._part(zoom, tile) for zoom in self.average.zooms], tile)
        kept = kept_bytes(tile, classes=self.classes, scores=self.scores)
        return TileCost(
            work=cost.work,
            device_bytes=cost.device_bytes,
            host_bytes=cost.host_bytes + kept,
        )

    def of_sample(self, tile: Tile) -> TileCost:
        """Cost of one sample of the certificate."""
        return self._of([tile.read for _ in self.average.zooms], tile)

    def _of(self, parts: Sequence[Region], tile: Tile) -> TileCost:
        """Cost of a tile of which each zoom computes a part."""
        trial, held = self.trial, 0
        for zoom, part in zip(self.average.zooms, parts, strict=True):
            size = self._resized(zoom, part)
            values = _SCRATCH * trial.bytes_px * size * self.itemsize / _FLOAT32
            values += 2 * max(size, part.size) * self.classes * _FLOAT32
            resized = resized_bytes(zoom, part.size, size, bands=trial.bands)
            held = max(held, int(values), resized)
        mean = 2 * mean_bytes(tile.read, classes=self.classes, average=self.average)  # in float64
        return TileCost(
            work=self._work(parts),
            device_bytes=held + mean,
            host_bytes=read_bytes(tile, pixel_bytes=self.pixel_bytes, guided=self.guided)
            + image_bytes(tile, bands=trial.bands, average=self.average),
        )

    def _part(self, zoom: Zoom, tile: Tile) -> Region:
        return self.average.part(zoom, tile.read, scored=tile.scored, shape=self.shape)

    @property
    def scene_work(self) -> int:
        """Multiply-adds of one pass over the padded scene, which halo work is measured against."""
        return self._work([Region.whole(self.shape) for _ in self.average.zooms])

    def _work(self, parts: Sequence[Region]) -> int:
        pixels = sum(map(self._resized, self.average.zooms, parts))
        return max(1, math.ceil(len(self.average.mirrors) * self.trial.work_px * pixels))

    def _resized(self, zoom: Zoom, part: Region) -> int:
        """Pixels of a part of the scene, resized."""
        return math.prod(side * zoom.up // zoom.down for side in part.shape)
