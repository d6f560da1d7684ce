"""STORY 1, one tile: read -> normalise -> predict -> refine -> keep core -> write.

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
from pipeline.errors import BundleError
from pipeline.inference.average import Average, Logits, averaged
from pipeline.inference.normalise import Normalised
from pipeline.inference.padding import read_padded
from pipeline.inference.precision import Precision, resolve_precision
from pipeline.inference.scene_context import SceneContext
from pipeline.models.bundle import Bundle
from pipeline.models.frame import Frame
from pipeline.ports import Area, ArrayStore, Block, Guard, Record, Source
from pipeline.stitching.keep_core import keep_core, to_labels, wanted
from pipeline.stitching.samples import Pieces, SampleSink
from pipeline.stitching.scores import ScoreSink, softmax
from pipeline.stitching.tally import Tally

if TYPE_CHECKING:
    from pipeline.models.context_pool import Context


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentModel:
    """The picklable recipe of a network on its device."""

    bundle: Bundle
    device: Literal["cpu", "cuda"]
    precision: Precision
    context: Context

    average: Average
    """Sizes and mirror images that probabilities are averaged over."""

    threads: int
    """Threads of a worker, fixed by the plan whatever the number of workers."""

    canonical_px: int | None
    """Side of canonical windows, in pixels; None: windows are rows of the tile."""

    window: int
    """Side of a box with as many features as are computed at once, where windows are rows."""

    hosted: bool
    """Whether feature maps are held in the memory of the host, wherever the device is."""

    @property
    def key(self) -> str:
        """All that decides what is loaded: two cases with equal keys share the network."""
        floats = f"{self.precision.name}-{'last' if self.precision.channels_last else 'first'}"
        average = f"{self.average.zooms} {self.average.axes}"
        windows = f"{self.context} {self.canonical_px} {self.window} {self.hosted} {average}"
        return f"{self.bundle.digest} {self.device} {floats} {windows} {self.threads}"

    def load(self) -> Logits:
        """Load the network. Raises BundleError, or PlanError where it would be emulated."""
        from pipeline.inference.predictor import Predictor

        resolve_precision(self.precision.name, device=self.device)
        predictor = Predictor(
            self.bundle,
            device=self.device,
            precision=self.precision,
            context=self.context,
            threads=self.threads,
            canonical_px=self.canonical_px,
            window=self.window,
            hosted=self.hosted,
        )
        return averaged(predictor, self.average)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TileLogits:
    """What the device made of a tile, over ``tile.scored``, in the memory of the host."""

    valid_S: NDArray[np.bool_]

    wanted_S: NDArray[np.bool_]
    """Of the core: the pixels that get a label."""

    guide_CS: NDArray[Any] | None
    """The image as it was read; None where no CRF wants it, so that what was read is freed."""

    logit_KS: NDArray[np.float32] | None
    """None where no pixel of the core is wanted; numbers at every valid pixel."""

    def __post_init__(self) -> None:
        # The least first, which is NaN where one is, and takes no memory.
        if self.logit_KS is None or not np.isnan(self.logit_KS.min()):
            return
        if bad := int((np.isnan(self.logit_KS).any(axis=0) & self.valid_S).sum()):
            raise BundleError(
                f"the network gives NaN at {bad} valid pixels, which would get the first class:"
                " look at its weights, its scaling and its precision"
            )

    @classmethod
    def of(
        cls,
        tile: Tile,
        block: Block,
        logit_KS: NDArray[np.float32] | None,
        *,
        wanted_S: NDArray[np.bool_],
        guided: bool,
    ) -> TileLogits:
        """With the part of ``block``, which is what was read, that is of use later; views."""
        image_CS = keep_core(block.image_CS, core=tile.scored, within=tile.read)
        return cls(
            valid_S=keep_core(block.valid_S, core=tile.scored, within=tile.read),
            wanted_S=wanted_S,
            guide_CS=image_CS if guided and logit_KS is not None else None,
            logit_KS=logit_KS,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TileResult:
    """What is written of a tile: (*S) labels, and (K, *S) scores, of its core."""

    labels_S: NDArray[Any]

    wanted_S: NDArray[np.bool_]
    """The pixels that have a label."""

    score_KS: NDArray[np.float32] | None
    """None where nothing was computed, or where nobody asked for scores: they are large."""

    samples: Pieces
    """Logits (K, *S) of the certificate's places, before the CRF."""

    skipped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentTiles:
    """The picklable recipe of one case: what to read, what to run, where to write."""

    key: str
    """The plan's fingerprint."""

    model: SegmentModel
    source: Source

    channels: tuple[int, ...]
    """Index in the source of each band that the network takes, in the network's order."""

    padded_shape: Shape
    """The scene grown to multiples of the stride, in pixels."""

    scene: SceneContext | None
    """Where image pooling gets the mean of the scene; None where it takes none."""

    crf: ResolvedCrf | None

    area: Area | None
    """Where labels are wanted, whatever is computed around it; None for the whole scene."""

    mask: ArrayStore
    scores: ScoreSink | None
    samples: SampleSink
    guard: Guard

    def read(self, tile: Tile) -> Block:
        """The bands of the network over the tile and its halo."""
        return read_padded(self.source, tile.read).bands(self.channels)

    def compute(self, model: Logits, tile: Tile, data: Block) -> TileLogits:
        """Logits on the host; the network is not asked where no pixel of the core is wanted."""
        wanted_S = wanted(tile, data, area=self.area)
        if not wanted_S.any():
            return TileLogits.of(tile, data, None, wanted_S=wanted_S, guided=False)
        frame = Frame.of(tile.read, shape=self.padded_shape)
        pooling = None if self.scene is None else self.scene.pooling(tile, data)
        logit_KS = model.logits(
            Normalised(data, self.model.bundle.input.scaling),
            frame,
            scored=tile.scored,
            pooling=pooling,
        )
        return TileLogits.of(
            tile, data, logit_KS.cpu().numpy(), wanted_S=wanted_S, guided=self.crf is not None
        )

    def refine(self, tile: Tile, data: TileLogits) -> TileResult:
        """Labels of the core, after the CRF where there is one."""
        bundle, score_KS, wanted_S = self.model.bundle, data.logit_KS, data.wanted_S
        values = np.array(bundle.class_values, dtype=bundle.mask_dtype)
        if score_KS is None:
            empty_S = np.full(wanted_S.shape, bundle.mask_nodata, dtype=values.dtype)
            return TileResult(
                labels_S=empty_S, wanted_S=wanted_S, score_KS=None, samples={}, skipped=True
            )
        samples = self.samples.cut(score_KS, core=tile.core, within=tile.scored)
        if self.crf is not None:
            score_KS = self._smooth(tile, data)
        core_KS = keep_core(score_KS, core=tile.core, within=tile.scored)
        labels_S = to_labels(core_KS, valid_S=wanted_S, values=values, nodata=bundle.mask_nodata)
        kept_KS = None if self.scores is None else core_KS
        return TileResult(labels_S=labels_S, wanted_S=wanted_S, score_KS=kept_KS, samples=samples)

    def _smooth(self, tile: Tile, data: TileLogits) -> NDArray[Any]:
        """Probabilities after the dense CRF, which sees ``tile.scored``; (K, *S) float32."""
        assert self.crf is not None
        assert data.logit_KS is not None
        assert data.guide_CS is not None
        return refine(
            softmax(data.logit_KS),
            block=Block(data.guide_CS, data.valid_S),
            origin=tile.scored.start,
            params=self.crf,
            engine=engine_named(
                self.crf.engine, device=self.model.device, threads=self.model.threads
            ),
        )

    def write(self, tile: Tile, result: TileResult) -> Record:
        """Whole chunks, scores first; refused when another run owns the directory."""
        self.guard.check()
        scores_digest = ""
        if self.scores is not None:
            prob_KS = self.probabilities(result)
            scores_digest = self.scores.write(tile.core, prob_KS, valid_S=result.wanted_S)
        self.samples.write(result.samples)
        digest = self.mask.write(tile.core, result.labels_S)
        tally = Tally.of(result.labels_S, core=tile.core, graticule=self.source.info.graticule)
        return Record(
            key=tile.key,
            status="done",
            digest=digest,
            scores_digest=scores_digest,
            skipped=result.skipped,
            counts=tally.counts,
            areas=tally.areas,
        )

    def probabilities(self, result: TileResult) -> NDArray[np.float32]:
        """(K, *S) float32: the CRF's, or the softmax of logits; zero where nothing was computed."""
        if result.score_KS is None:
            classes = len(self.model.bundle.classes)
            return np.zeros((classes, *result.wanted_S.shape), dtype=np.float32)
        return result.score_KS if self.crf else softmax(result.score_KS)
