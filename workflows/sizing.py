"""How large a tile is, and what it will take: work, memory, storage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from pipeline.crf.native_engine import MOST_KEPT_BYTES
from pipeline.crf.params import ResolvedCrf
from pipeline.domain import Grid, Halo, ImageInfo, Pass, Reach, SamplePass, Shape, Tile, Walk
from pipeline.errors import PlanError
from pipeline.inference.canonical import CANONICAL_PX
from pipeline.inference.precision import Precision
from pipeline.inference.predictor import WINDOW
from pipeline.inference.scene_context import sums_layout
from pipeline.inference.tile_cost import CostModel, TileCost
from pipeline.inference.whole_cost import Trial, WholeCostModel
from pipeline.models.bundle import Bundle, CustomArchitecture
from pipeline.models.deeplab import aspp_width
from workflows.config import SegmentOptions
from workflows.tracing import Traced

AUTO_TILES = {2: (512, 1024, 2048, 4096, 8192), 3: (64, 96, 128, 192, 256, 384)}
"""Sides that ``auto`` chooses from, in pixels, by number of axes."""

NEAR_BEST = 1.1
"""``auto`` takes the smallest tile that needs at most so many times the least time."""

THREAD_GAIN = 0.9
"""Two threads of a worker do the work of 2 to this power."""

DRIVER_BYTES = 850 * 2**20
WORKER_BYTES = 720 * 2**20
"""What the processes hold beside their tiles: torch, GDAL, Ray, MLflow (measured, PSS)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """Who runs the tiles."""

    workers: int

    threads: int
    """Of each worker."""

    device: Literal["cpu", "cuda"]

    alone: bool
    """False where other images share the workers."""

    def for_tiles(self, count: int) -> Team:
        """The team for so few tiles that workers are left over: fewer, with their threads.

        >>> Team(workers=8, threads=2, device="cpu", alone=True).for_tiles(3).threads
        5
        """
        if count >= self.workers or self.device != "cpu" or not self.alone:
            return self
        return replace(self, workers=count, threads=self.workers * self.threads // count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes that a plan may take."""

    host: int

    device: int | None
    """None where the device's memory is the host's, or is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What the tiles take: of one pass, or of two over the same grid."""

    tiles: int
    """Of one pass."""

    work: int
    """Multiply-adds of all tiles of all passes."""

    scene_work: int
    """Multiply-adds of one pass over the whole scene."""

    sample_work: int
    """Multiply-adds of the certificate's samples."""

    largest: TileCost
    """The most that any tile takes, each figure by itself."""

    scored: int
    """Pixels of the largest tile or sample that the CRF sees."""

    read_ratio: float
    """Pixels that tiles read over those of the scene."""

    read_amplification: float
    """Pixels that are decoded over those of the scene: what neighbours share is remembered."""

    cache_bytes: int
    """Decoded blocks that a worker's reader comes back to while it walks a band of tiles."""

    @classmethod
    def of(cls, sweep: Pass, model: CostModel | WholeCostModel) -> Costs:
        """Counted over one tile of each kind."""
        cost_of = model.of
        if isinstance(model, CostModel) and sweep.name == "context":
            cost_of = model.of_sums
        kinds = [(tile, cost_of(tile), alike) for tile, alike in sweep.kinds()]
        return cls(
            tiles=len(sweep),
            work=sum(cost.work * alike for _, cost, alike in kinds),
            scene_work=model.scene_work,
            sample_work=0,
            largest=_largest([cost for _, cost, _ in kinds]),
            scored=max(tile.scored.size for tile, _, _ in kinds),
            read_ratio=sweep.read_ratio,
            read_amplification=Walk(sweep).read_amplification,
            cache_bytes=Walk(sweep).remembered_pixels * model.pixel_bytes,
        )

    def __add__(self, other: Costs) -> Costs:
        """Of this pass and another one over the same grid."""
        return replace(
            self,
            work=self.work + other.work,
            largest=_largest([self.largest, other.largest]),
            scored=max(self.scored, other.scored),
            read_ratio=self.read_ratio + other.read_ratio,
            read_amplification=self.read_amplification + other.read_amplification,
            cache_bytes=max(self.cache_bytes, other.cache_bytes),
        )

    def with_samples(self, tiles: Sequence[Tile], model: CostModel | WholeCostModel) -> Costs:
        """The same with what the certificate takes; its CRF may see more than that of a tile."""
        samples = [model.of_sample(tile) for tile in tiles]
        return replace(
            self,
            largest=_largest([self.largest, *samples]),
            scored=max([self.scored, *(tile.scored.size for tile in tiles)]),
            sample_work=sum(cost.work for cost in samples),
        )

    @property
    def halo_work_ratio(self) -> float:
        """Work of the tiles over that of one pass; 1.0 means no halo work."""
        return self.work / self.scene_work

    def span(self, team: Team) -> float:
        """Multiply-adds that the busiest worker's first thread does: time, up to a factor."""
        rounds = -(-self.tiles // team.workers)
        return float(rounds * self.work / self.tiles / team.threads**THREAD_GAIN)

    def as_json(self) -> dict[str, Any]:
        """What the plan says of them."""
        return {
            "halo_work_ratio": round(self.halo_work_ratio, 4),
            "certificate_work_ratio": round(self.sample_work / self.scene_work, 4),
            "read_ratio": round(self.read_ratio, 4),
            "read_amplification": round(self.read_amplification, 4),
            "multiply_adds": self.work,
            "device_bytes": self.largest.device_bytes,
        }


def _largest(costs: Sequence[TileCost]) -> TileCost:
    """The most of each figure."""
    return TileCost(
        work=max(cost.work for cost in costs),
        device_bytes=max(cost.device_bytes for cost in costs),
        host_bytes=max(cost.host_bytes for cost in costs),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizer:
    """What the size of a tile depends on."""

    bundle: Bundle
    info: ImageInfo
    traced: Traced

    reach: Reach
    """What is read around a tile; shorter than the network's where that was asked."""

    whole: Reach
    """Of the network's own layers: the certificate's samples read so much."""

    crf: ResolvedCrf | None

    canonical_px: int | None
    """Side of canonical windows, in pixels; None where windows are rows of the tile."""

    scores: bool
    """Whether probabilities are written as well."""

    def sweep(self, tile: Shape, *, case: str) -> Pass:
        """The pass that writes the mask, in such tiles."""
        return Pass(
            case=case,
            name="segment",
            grid=Grid(
                shape=self.info.shape,
                tile=tile,
                stride=self.reach.stride,
                endpoint=self.reach.endpoint,
            ),
            reach=self.reach,
            crf_halo=self.crf.halo_px if self.crf else Halo.uniform(0, ndim=self.info.ndim),
        )

    def samples(self, sweep: Pass, *, seed: str) -> SamplePass:
        """The pass that computes samples again; ``seed`` decides where they lie."""
        return SamplePass.of(sweep, reach=self.whole, seed=seed)

    def costs(self, sweep: Pass, precision: Precision) -> Costs:
        """What all passes take in these floats."""
        model = self._model(sweep, precision)
        samples = list(self.samples(sweep, seed="").tiles())
        *before, last = sweep.with_context()
        if isinstance(model, WholeCostModel) or not before:
            return Costs.of(last, model).with_samples(samples, model)
        both = Costs.of(before[0], model) + Costs.of(last, model.given_the_mean())
        return both.with_samples(samples, model)

    def _model(self, sweep: Pass, precision: Precision) -> CostModel | WholeCostModel:
        classes, itemsize = len(self.bundle.classes), precision.dtype.itemsize
        pixel_bytes = len(self.info.channels) * np.dtype(self.info.dtype).itemsize
        if isinstance(self.traced.body, Trial):
            return WholeCostModel(
                trial=self.traced.body,
                classes=classes,
                itemsize=itemsize,
                pixel_bytes=pixel_bytes,
                shape=sweep.grid.padded_shape,
                scores=self.scores,
                average=self.traced.average,
            )
        return CostModel(
            chain=self.traced.body,
            classes=classes,
            window=WINDOW,
            canonical_px=self.canonical_px,
            itemsize=itemsize,
            pixel_bytes=pixel_bytes,
            shape=sweep.grid.padded_shape,
            scores=self.scores,
            average=self.traced.average,
        )

    def peak_bytes(self, costs: Costs, *, workers: int, device: Literal["cpu", "cuda"]) -> int:
        """Predicted peak of the host's memory, driver and ``workers`` together."""
        # The samples are computed by the network as it is, beside the one in stages.
        tile = costs.largest.host_bytes + self.traced.weight_bytes * (1 + bool(costs.sample_work))
        if self.info.ndim == 2:  # volumes are mapped into memory, or unpacked first
            tile += costs.cache_bytes
        if device == "cpu":
            tile += costs.largest.device_bytes
        if self.crf is not None:
            tile += crf_bytes(costs.scored, classes=len(self.bundle.classes))
        return DRIVER_BYTES + min(workers, costs.tiles) * (WORKER_BYTES + tile)

    def choose(
        self, asked: int | None, team: Team, *, precision: Precision, budget: Budget
    ) -> tuple[Shape, Team]:
        """The tile asked for, or the smallest that takes nearly the least time within the budget.

        A small tile is redone, retried and reported sooner. Where none fits, the smallest.
        """
        stride = self.reach.stride
        auto = (-(-side // stride) * stride for side in AUTO_TILES[self.info.ndim])
        sides = tuple(auto) if asked is None else (asked,)
        smallest = AUTO_TILES[self.info.ndim][0]
        choices: list[tuple[Shape, Team, float]] = []
        fitting: list[tuple[Shape, Team, float]] = []
        for side in sides:
            tile = self._side(side)
            costs = self.costs(self.sweep(tile, case=""), precision)
            # A tile of the smallest size is soon done by one thread, in a batch as well. And
            # where any tile shall give the same bytes, it must not decide the threads.
            same = max(tile) <= smallest or self.canonical_px is not None
            own = team if same else team.for_tiles(costs.tiles)
            choices.append((tile, own, costs.span(own)))
            peak = self.peak_bytes(costs, workers=own.workers, device=team.device)
            on_device = budget.device is None or costs.largest.device_bytes <= budget.device
            if peak <= budget.host and on_device:
                fitting.append(choices[-1])
        fitting = fitting or choices[:1]
        least = min(span for *_, span in fitting)
        return next((tile, own) for tile, own, span in fitting if span <= NEAR_BEST * least)

    def _side(self, side: int) -> Shape:
        """A square tile, no longer than the padded scene on any axis. Raises PlanError."""
        stride = self.reach.stride
        if side % stride:
            own = self.traced.average.own.stride
            more = f", for sizes of the scene {stride} px" if stride > own else ""
            raise PlanError(
                f"--tile {side}: must be a multiple of the output stride, {own} px{more}"
            )
        if self.canonical_px is not None and side % self.canonical_px:
            raise PlanError(
                f"--tile {side}: must be a multiple of the canonical window, {self.canonical_px} px"
            )
        return tuple(min(side, -(-n // stride) * stride) for n in self.info.shape)


def crf_bytes(pixels: int, *, classes: int) -> int:
    """What an engine takes on top of its inputs, the plans that it keeps included.

    The native one on noise with a guide's deviation of 3, whose lattice is among the largest: 970
    to 1170 bytes a pixel at 2 classes, 1720 at 21. Images take a third of it and less.
    """
    return pixels * (1130 + 30 * classes) + MOST_KEPT_BYTES


def canonical_side(options: SegmentOptions, bundle: Bundle) -> int | None:
    """Side of canonical windows, in pixels; None where windows are rows of the tile.

    Raises PlanError where the tile would decide the bytes for another reason.
    """
    if options.windows == "rows":
        return None
    if isinstance(bundle.architecture, CustomArchitecture):
        raise PlanError("--windows canonical needs a network in stages, a custom one runs as one")
    others = {"--halo": options.halo != "exact" and options.halo}
    others["--context"] = (
        bundle.architecture.pools and options.context == "tile" and options.context
    )
    for name, value in others.items():
        if value:
            raise PlanError(
                f"--windows canonical makes bytes that do not depend on the tile, {name} {value}"
                " those that do: leave out one of them"
            )
    return CANONICAL_PX[bundle.architecture.dims]


def over_budget(
    peak: int, *, asked: int | None, here: int, workers: int, tile: Shape
) -> tuple[str, ...]:
    """A note where the predicted peak is more than this machine has.

    Raises PlanError where it is more than was ``asked`` for.
    """
    side = " x ".join(map(str, tile))
    takes = f"the plan takes {peak / 1e9:.1f} GB ({workers} workers, tiles of {side} px)"
    if asked is not None and peak > asked:
        raise PlanError(
            f"--memory-budget {asked / 1e9:.1f} GB asked, {takes}: give fewer --workers,"
            " a smaller --tile, or a greater budget"
        )
    if peak <= here:
        return ()
    return (f"{takes}, this machine has {here / 1e9:.1f} GB: fewer --workers or a smaller --tile",)


def store_bytes(bundle: Bundle, sweep: Pass, *, scores: str) -> int:
    """Uncompressed bytes of mask, scores when asked for, and the sums of a context pass."""
    score_size = {"none": 0, "uint8": 1, "float16": 2}[scores]
    mask_size = 1 if bundle.mask_dtype == "uint8" else 2
    sums = 0
    if len(sweep.with_context()) > 1:
        assert not isinstance(bundle.architecture, CustomArchitecture)
        shape, _ = sums_layout(sweep.grid, aspp_width(bundle.architecture))
        sums = 8 * math.prod(shape)
    return math.prod(sweep.grid.shape) * (mask_size + score_size * len(bundle.classes)) + sums
