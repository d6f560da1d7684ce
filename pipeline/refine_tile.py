"""STORY 4, one tile without a network: read image and scores -> dense CRF -> keep core -> write.

C channel, K class, S space: (y, x) or (z, y, x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.crf.dense import refine
from pipeline.crf.engine import Device, Engine, EngineName, engine_named
from pipeline.crf.params import ResolvedCrf
from pipeline.domain import Tile
from pipeline.models.input_spec import Legend
from pipeline.ports import ArrayStore, Block, Guard, PieceStore, Record, Source
from pipeline.stitching.given_scores import given_probabilities
from pipeline.stitching.keep_core import keep_core, to_labels
from pipeline.stitching.tally import Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class CrfModel:
    """The picklable recipe of the engine, which stands where a network would."""

    engine: EngineName
    device: Device

    threads: int
    """Threads of a worker, fixed by the plan whatever the number of workers."""

    @property
    def key(self) -> str:
        """All that decides what is loaded."""
        return f"crf {self.engine} {self.device} {self.threads}"

    def load(self) -> Engine:
        """Load the engine. Raises CrfError where it is not installed."""
        return engine_named(self.engine, device=self.device, threads=self.threads)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Given:
    """What was read of a tile, over ``tile.read``."""

    block: Block
    """What guides the CRF; valid where image and scores are."""

    prob_KS: NDArray[np.float32]
    """(K, *S), sums to 1 over K; 0 where not valid."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refined:
    """A tile after the CRF."""

    valid_S: NDArray[np.bool_]

    prob_KS: NDArray[np.float32] | None
    """(K, *S) over the core; None where none of its pixels is valid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineTiles:
    """The picklable recipe of one case: what to read, which energy, where to write."""

    key: str
    """The plan's fingerprint."""

    model: CrfModel
    source: Source
    scores: Source
    crf: ResolvedCrf
    legend: Legend
    mask: ArrayStore
    guard: Guard

    def read(self, tile: Tile) -> Given:
        """Image and probabilities of the tile and its halo; fresh arrays."""
        image = self.source.read(tile.read)
        prob_KS, known_S = given_probabilities(self.scores.read(tile.read))
        return Given(block=Block(image.image_CS, image.valid_S & known_S), prob_KS=prob_KS)

    def compute(self, model: Engine, tile: Tile, data: Given) -> Refined:
        """Mean field over all that was read; none where no pixel of the core is valid."""
        valid_S = keep_core(data.block.valid_S, core=tile.core, within=tile.read)
        if not valid_S.any():
            return Refined(valid_S=valid_S, prob_KS=None)
        all_KS = refine(
            data.prob_KS, block=data.block, origin=tile.read.start, params=self.crf, engine=model
        )
        core_KS = keep_core(all_KS, core=tile.core, within=tile.read).copy()
        return Refined(valid_S=valid_S, prob_KS=core_KS)

    def refine(self, tile: Tile, data: Refined) -> NDArray[Any]:
        """Labels (*S) of the core in the mask's dtype."""
        dtype, nodata = np.dtype(self.legend.dtype), self.legend.nodata
        if data.prob_KS is None:
            return np.full(data.valid_S.shape, nodata, dtype)
        values = np.array(self.legend.values, dtype)
        return to_labels(data.prob_KS, valid_S=data.valid_S, values=values, nodata=nodata)

    def write(self, tile: Tile, result: NDArray[Any]) -> Record:
        """A whole chunk; refused when another run owns the directory."""
        self.guard.check()
        digest = self.mask.write(tile.core, result)
        tally = Tally.of(result, core=tile.core, graticule=self.source.info.graticule)
        return Record(
            key=tile.key,
            status="done",
            digest=digest,
            skipped=bool((result == self.legend.nodata).all()),
            counts=tally.counts,
            areas=tally.areas,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineSamples:
    """The samples of the certificate: the same, but each place on its own, with more context."""

    key: str
    """The plan's fingerprint, marked as the samples'."""

    tiles: RefineTiles
    labels: PieceStore

    @property
    def model(self) -> CrfModel:
        """That of the tiles."""
        return self.tiles.model

    def read(self, tile: Tile) -> Given:
        """As a tile is read."""
        return self.tiles.read(tile)

    def compute(self, model: Engine, tile: Tile, data: Given) -> Refined:
        """As a tile is computed."""
        return self.tiles.compute(model, tile, data)

    def refine(self, tile: Tile, data: Refined) -> NDArray[Any]:
        """Labels (*S) of the sample."""
        return self.tiles.refine(tile, data)

    def write(self, tile: Tile, result: NDArray[Any]) -> Record:
        """Keep the labels; refused when another run owns the directory."""
        self.tiles.guard.check()
        self.labels.write(tile.core, result)
        return Record(key=tile.key, status="done")
