"""How large a tile is, and what it will take: work, memory, storage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.crf.params import ResolvedCrf
from pipeline.domain import Grid, Halo, ImageInfo, Pass, Reach, SamplePass, Shape
from pipeline.errors import PlanError
from pipeline.inference.canonical import CANONICAL_PX
from pipeline.inference.precision import Precision
from pipeline.inference.predictor import WINDOW
from pipeline.inference.scene_context import sums_layout
from pipeline.inference.tile_cost import CostModel
from pipeline.inference.whole_cost import Trial, WholeCostModel
from pipeline.models.bundle import Bundle, CustomArchitecture
from pipeline.models.deeplab import aspp_width
from pipeline.ports import Area
from workflows.aoi import tiles_within
from workflows.config import SegmentOptions
from workflows.costs import WORKER_BYTES, Budget, Costs, Team, crf_bytes
from workflows.tracing import Traced

AUTO_TILES = {2: (512, 1024, 2048, 4096, 8192), 3: (64, 96, 128, 192, 256, 384)}
"""Sides that ``auto`` chooses from, in pixels, by number of axes."""

NEAR_BEST = 1.1
"""``auto`` takes the smallest tile that needs at most so many times the least time."""


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

    area: Area | None
    """Where labels are wanted: no other tile runs; None for all of the scene."""

    driver_bytes: int
    """What the driver holds, whatever the tile."""

    def sweep(self, tile: Shape, *, case: str) -> Pass:
        """The pass that writes the mask, in such tiles."""
        grid = Grid(
            shape=self.info.shape,
            tile=tile,
            stride=self.reach.stride,
            endpoint=self.reach.endpoint,
        )
        return Pass(
            case=case,
            name="segment",
            grid=grid,
            chosen=None if self.area is None else tiles_within(self.area, grid),
            reach=self.reach,
            crf_halo=self.crf.halo_px if self.crf else Halo.uniform(0, ndim=self.info.ndim),
        )

    def samples(self, sweep: Pass, *, seed: str) -> SamplePass:
        """The pass that computes samples again; ``seed`` decides where they lie."""
        wanted = None if self.area is None else self.area.touches
        return SamplePass.of(sweep, reach=self.whole, seed=seed, wanted=wanted)

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
        return self.driver_bytes + min(workers, costs.tiles) * (WORKER_BYTES + tile)

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
            sweep = self.sweep(tile, case="")
            costs = self.costs(sweep, precision)
            # A tile of the smallest size is soon done by one thread, in a batch as well. And
            # where any tile shall give the same bytes, it must not decide the threads. Of all tiles
            # that there are, so that an area does not decide them either.
            same = max(tile) <= smallest or self.canonical_px is not None
            own = team if same else team.for_tiles(len(sweep.grid))
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
