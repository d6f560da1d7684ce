"""What tiles say in a few small places, kept for the seam certificate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from pipeline.domain import Region
from pipeline.ports import PieceStore
from pipeline.stitching.keep_core import keep_core

Pieces = Mapping[Region, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class SampleSink:
    """Cuts the sampled places out of tiles, and keeps them."""

    store: PieceStore
    regions: tuple[Region, ...]

    def parts(self, core: Region) -> list[Region]:
        """Where the sampled places meet the core of a tile."""
        return [part for part in (region & core for region in self.regions) if part.size]

    def cut(self, logit_KS: NDArray[Any], *, core: Region, within: Region) -> Pieces:
        """Logits (K, *S) of each part, from those that lie ``within``; copies."""
        return {
            part: keep_core(logit_KS, core=part, within=within).copy() for part in self.parts(core)
        }

    def write(self, pieces: Pieces) -> None:
        """Keep them. Raises StoreError."""
        for region, piece_KS in pieces.items():
            self.store.write(region, piece_KS)
