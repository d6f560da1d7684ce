"""A map of features of which some rows are held, on the device or in the memory of the host.

Axes in array names: B batch, C channel, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.domain import Halo, Region
from pipeline.inference.stage_plan import beside


@dataclass(slots=True)
class FeatureMap:
    """Features of a region, of which some rows are held at a time."""

    array_BSC: Tensor
    """(1, *S, C), contiguous; room for rows that are not held may follow."""

    region: Region
    """What is held, or being computed."""

    device: torch.device
    """Where windows are computed."""

    @classmethod
    def memory(cls, size: int, *, like: Tensor) -> Tensor:
        """Room for so many numbers of maps, in the floats and on the device of ``like``."""
        return like.new_empty(size)

    @classmethod
    def empty(cls, array_BSC: Tensor, region: Region, *, device: torch.device) -> FeatureMap:
        """A map of ``region`` that holds no row yet."""
        return cls(array_BSC, Region(region.start, (region.start[0], *region.stop[1:])), device)

    @property
    def near(self) -> bool:
        """Whether it is held where windows are computed."""
        return self.array_BSC.device == self.device

    def roll(self, stop: int, *, keep: int) -> None:
        """Hold rows before ``stop``, for lack of room without those before ``keep``."""
        first, held = self.region.start[0], self.region.stop[0]
        if stop - first > self.array_BSC.shape[1]:
            rows, way = self.array_BSC[0], keep - first
            for at in range(way, held - first, way):  # in parts that lie apart from their place
                part = rows[at : min(at + way, held - first)]
                rows[at - way : at - way + len(part)].copy_(part)
            first = keep
        start, end = self.region.start[1:], self.region.stop[1:]
        self.region = Region((first, *start), (stop, *end))

    def view(self, region: Region) -> Tensor:
        """``region``, which is held, as (1, C, *S), in the memory of the map."""
        index: tuple[slice, ...] = (slice(None), *region.slices(within=self.region))
        return self.array_BSC[index].movedim(-1, 1)

    def read(self, region: Region) -> Tensor:
        """What a layer that needs ``region`` gets: (1, C, *S) on the device, not to be written."""
        return self.view(region).to(self.device)

    def read_all(self) -> Tensor:
        """What a layer that needs all is given, as ``read`` gives it."""
        return self.view(self.region).to(self.device)

    def write(self, region: Region, value_BCS: Tensor) -> None:
        """Hold a value of ``region`` from now on."""
        self.view(region).copy_(value_BCS)

    def add(self, region: Region, value_BCS: Tensor, *, fresh: int) -> None:
        """Add a value to what is held of ``region``, of which the first ``fresh`` rows are new."""
        sum_BCS, value_BCS = self.view(region), value_BCS.to(self.array_BSC.device)
        sum_BCS[:, :, :fresh].copy_(value_BCS[:, :, :fresh])
        sum_BCS[:, :, fresh:].add_(value_BCS[:, :, fresh:])

    def beside(self, region: Region) -> Halo:
        """What is read with ``region``, which is held, so that it need not be copied."""
        return beside(region, self.region)


class HostMap(FeatureMap):
    """A map in the memory of the host: what a window reads is copied, and what it makes."""

    @classmethod
    def memory(cls, size: int, *, like: Tensor) -> Tensor:
        """As of any map; pinned, where a GPU copies from it and to it."""
        return torch.empty(size, dtype=like.dtype, pin_memory=like.is_cuda)
