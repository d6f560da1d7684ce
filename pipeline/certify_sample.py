"""STORY 3, one sample of the certificate: read -> normalise -> whole network -> refine -> keep.

Nothing of how tiles are read, cut or computed is used here, so that a fault there is seen.

C channel, K class, S space: (y, x) or (z, y, x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.crf.dense import refine
from pipeline.crf.engine import engine_named
from pipeline.crf.params import ResolvedCrf
from pipeline.domain import Shape, Tile
from pipeline.inference.average import Average
from pipeline.inference.normalise import normalise
from pipeline.inference.precision import Precision, resolve_precision
from pipeline.inference.scene_context import SceneSums
from pipeline.models.bundle import Bundle
from pipeline.models.frame import Frame
from pipeline.ports import Area, Block, Guard, PieceStore, Record, Source
from pipeline.segment_tile import TileLogits
from pipeline.stitching.keep_core import keep_core, to_labels, wanted
from pipeline.stitching.scores import softmax

if TYPE_CHECKING:
    from pipeline.inference.reference import ReferenceNetwork


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceModel:
    """The picklable recipe of a network that is not taken apart."""

    bundle: Bundle
    device: Literal["cpu", "cuda"]
    precision: Precision
    average: Average
    threads: int

    @property
    def key(self) -> str:
        """All that decides what is loaded."""
        floats = f"{self.precision.name}-{'last' if self.precision.channels_last else 'first'}"
        average = f"{self.average.zooms} {self.average.axes}"
        return f"whole {self.bundle.digest} {self.device} {floats} {average} {self.threads}"

    def load(self) -> ReferenceNetwork:
        """Load the network. Raises BundleError, or PlanError where it would be emulated."""
        from pipeline.inference.reference import ReferenceNetwork

        resolve_precision(self.precision.name, device=self.device)
        return ReferenceNetwork(
            self.bundle,
            device=self.device,
            precision=self.precision,
            average=self.average,
            threads=self.threads,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """What a sample should be."""

    logits_KS: NDArray[np.float32]
    """NaN where no pixel is wanted."""

    labels_S: NDArray[Any]
    """As the mask's, after the CRF where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CertifySamples:
    """The picklable recipe of the samples of one case."""

    key: str
    """The plan's fingerprint, marked as the samples'."""

    model: ReferenceModel
    source: Source

    channels: tuple[int, ...]
    """Index in the source of each band that the network takes, in the network's order."""

    padded_shape: Shape

    scene: SceneSums | None
    """Where the scene's mean is, that image pooling takes; None where it takes none."""

    crf: ResolvedCrf | None

    area: Area | None
    """Where labels are wanted: nothing is compared elsewhere; None for the whole scene."""

    logits: PieceStore
    labels: PieceStore
    guard: Guard

    def read(self, tile: Tile) -> Block:
        """The bands of the network; past the scene's bottom and right they go on mirrored."""
        scene = self.source.info.shape
        inside = tile.read.clip(scene)
        block = self.source.read(inside)
        beyond = [(0, b - a) for a, b in zip(inside.stop, tile.read.stop, strict=True)]
        image_CS = np.pad(block.image_CS[list(self.channels)], [(0, 0), *beyond], mode="reflect")
        return Block(image_CS, np.pad(block.valid_S, beyond, mode="reflect"))

    def compute(self, model: ReferenceNetwork, tile: Tile, data: Block) -> TileLogits:
        """Logits from one forward over all that was read; none where no pixel is wanted."""
        wanted_S = wanted(tile, data, area=self.area)
        if not wanted_S.any():
            return TileLogits.of(tile, data, None, wanted_S=wanted_S, guided=False)
        frame = Frame.of(tile.read, shape=self.padded_shape)
        mean = None if self.scene is None else self.scene.pooling(tile, data)
        all_KS = model.logits(normalise(data, self.model.bundle.input.scaling), frame, mean=mean)
        scored_KS = keep_core(all_KS, core=tile.scored, within=tile.read)
        return TileLogits.of(tile, data, scored_KS, wanted_S=wanted_S, guided=self.crf is not None)

    def refine(self, tile: Tile, data: TileLogits) -> Reference:
        """Logits and labels of the sample; the CRF sees more around it than that of a tile."""
        bundle, score_KS, wanted_S = self.model.bundle, data.logit_KS, data.wanted_S
        values = np.array(bundle.class_values, dtype=bundle.mask_dtype)
        if score_KS is None:
            return Reference(
                logits_KS=np.full((len(values), *wanted_S.shape), np.nan, np.float32),
                labels_S=np.full(wanted_S.shape, bundle.mask_nodata, values.dtype),
            )
        logits_KS = keep_core(score_KS, core=tile.core, within=tile.scored)
        if self.crf is not None:
            assert data.guide_CS is not None
            score_KS = refine(
                softmax(score_KS),
                block=Block(data.guide_CS, data.valid_S),
                origin=tile.scored.start,
                params=self.crf,
                engine=engine_named(
                    self.crf.engine, device=self.model.device, threads=self.model.threads
                ),
            )
        core_KS = keep_core(score_KS, core=tile.core, within=tile.scored)
        return Reference(
            logits_KS=np.where(wanted_S, logits_KS, np.float32(np.nan)),
            labels_S=to_labels(core_KS, valid_S=wanted_S, values=values, nodata=bundle.mask_nodata),
        )

    def write(self, tile: Tile, result: Reference) -> Record:
        """Keep both; refused when another run owns the directory."""
        self.guard.check()
        self.logits.write(tile.core, result.logits_KS)
        self.labels.write(tile.core, result.labels_S)
        return Record(key=tile.key, status="done")
