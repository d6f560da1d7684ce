"""STORY 1, before it, one tile of the scene's mean: read -> normalise -> trunk -> sum -> write.

C channel, S space: (y, x) or (z, y, x).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.domain import Shape, Tile
from pipeline.inference.average import Logits
from pipeline.inference.normalise import Normalised
from pipeline.inference.padding import read_padded
from pipeline.inference.scene_context import SceneSums, core_features
from pipeline.models.frame import Frame
from pipeline.models.scene_mean import block_sums
from pipeline.ports import Block, Guard, Record, Source
from pipeline.segment_tile import SegmentModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextTiles:
    """The picklable recipe of one case's context pass."""

    key: str
    """The plan's fingerprint, marked as this pass's."""

    model: SegmentModel
    source: Source

    channels: tuple[int, ...]
    """Index in the source of each band that the network takes, in the network's order."""

    padded_shape: Shape
    """The scene grown to multiples of the stride, in pixels."""

    sums: SceneSums
    guard: Guard

    def read(self, tile: Tile) -> Block:
        """The bands of the network over the tile and its halo."""
        return read_padded(self.source, tile.read).bands(self.channels)

    def compute(self, model: Logits, tile: Tile, data: Block) -> NDArray[np.float64]:
        """(C + 1, *blocks) sums of the core's features, and how many count.

        The network is not asked where none does.
        """
        stride = self.model.bundle.architecture.output_stride
        valid_S = core_features(tile, data, stride=stride)
        if not valid_S.any():
            return self.sums.zeros(tile.core)
        frame = Frame.of(tile.read, shape=self.padded_shape)
        features_CS = model.pooled(
            Normalised(data, self.model.bundle.input.scaling), frame, core=tile.scored
        )
        return block_sums(features_CS, valid_S, block=self.sums.block)

    def refine(self, tile: Tile, data: NDArray[np.float64]) -> NDArray[np.float64]:
        """Nothing: sums are written as they are."""
        return data

    def write(self, tile: Tile, result: NDArray[np.float64]) -> Record:
        """A whole chunk; refused when another run owns the directory."""
        self.guard.check()
        digest = self.sums.write(tile.core, result)
        skipped = not result[-1].any()
        return Record(key=tile.key, status="done", digest=digest, skipped=skipped)
