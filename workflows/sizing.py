"""How large a tile is, and what it will take: work, memory, storage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pipeline.crf.density import Density
from pipeline.crf.engine import Device, pick_engine
from pipeline.crf.memory import CrfMemory, crf_memory
from pipeline.crf.params import ResolvedCrf
from pipeline.domain import Grid, Halo, ImageInfo, Pass, Reach, SamplePass, Shape
from pipeline.errors import PlanError
from pipeline.inference.canonical import CANONICAL_PX
from pipeline.inference.precision import Precision
from pipeline.inference.scene_context import sums_layout
from pipeline.inference.tile_cost import CostModel
from pipeline.inference.whole_cost import Trial, WholeCostModel
from pipeline.models.bundle import Bundle, CustomArchitecture
from pipeline.models.deeplab import aspp_width
from pipeline.ports import Area
from workflows.aoi import tiles_within
from workflows.config import SegmentOptions
from workflows.costs import WORKER_BYTES, Budget, Costs, Team
from workflows.tracing import Traced

AUTO_TILES = {2: (512, 1024, 2048, 4096, 8192), 3: (64, 96, 128, 192, 256, 384)}
"""Sides that ``auto`` chooses from, in pixels, by number of axes."""

WINDOWS: Mapping[Device, Mapping[int, float]] = {
    "cpu": {64: 1.0, 46: 1.1, 32: 1.2},
    "cuda": {512: 1.0, 256: 1.0, 128: 1.0, 64: 1.0, 46: 1.1, 32: 1.2},
}
"""Sides of a window that ``auto`` chooses from, in features, the one to be taken where there is
memory first, and what each takes of time over it.

On a CPU larger ones are slower, and smaller ones were, by 0 to 14 and by 8 % and more, when they
were measured. On a GPU, which small windows leave idle between launches, nothing has been measured.
"""

WIDE_BYTES = 18_000_000
"""Of a raster's widest map in a window: on a CPU larger windows are left out.

The ResNet-50 of 4096 px in fp32 takes 46 rather than 64 features a side: bands of 4 rows, 0.27 GB
less of a worker's 1.8, and 4 % more time (measured).
"""

HOSTED = 4.0
"""Time of a tile whose maps are held in the host's memory over that of one on a GPU. Counted for
ResNet-50 in bf16: 23,000 features are written and read two or three times for each of the last, 110
KB, in 5 us at 25 GB/s; their 120 MFLOP take 0.4 us on the fastest cards and 8 on small ones. So the
tile that fits is taken, unless its halo is four times the work. Not measured."""

NEAR_BEST = 1.1
"""``auto`` takes the smallest tile that needs at most so many times the least time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How large tiles and windows might be, and who runs them."""

    tile: Shape

    window: int
    """Side of a window, in features."""

    hosted: bool
    """Whether maps are held in the memory of the host."""

    team: Team

    span: float
    """Multiply-adds of the busiest worker's first thread, in the time of the best windows."""

    taken: int
    """Bytes, of host and device together."""

    fits: bool
    """Whether they are within the budget."""


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

    density: Density | None
    """Of the image, as this CRF sees it; None without one."""

    canonical_px: int | None
    """Side of canonical windows, in pixels; None where windows are rows of the tile."""

    window: int
    """Side of a box of features: the device computes as many at once, where windows are rows."""

    hosted: bool
    """Whether feature maps are held in the memory of the host, beside a GPU."""

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

    def samples(self, sweep: Pass) -> SamplePass:
        """As many and as large as those that will be computed again, wherever those will lie."""
        wanted = None if self.area is None else self.area.touches
        return SamplePass.of(sweep, reach=self.whole, seed="", wanted=wanted)

    def costs(self, sweep: Pass, precision: Precision) -> Costs:
        """What all passes take in these floats."""
        model = self._model(sweep, precision)
        samples = list(self.samples(sweep).tiles())
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
                guided=self.crf is not None,
                average=self.traced.average,
            )
        return CostModel(
            chain=self.traced.body,
            live_px=self.traced.live_px,
            classes=classes,
            window=self.window,
            hosted=self.hosted,
            canonical_px=self.canonical_px,
            itemsize=itemsize,
            pixel_bytes=pixel_bytes,
            shape=sweep.grid.padded_shape,
            scores=self.scores,
            guided=self.crf is not None,
            average=self.traced.average,
        )

    def _crf_memory(self, costs: Costs, device: Device) -> CrfMemory:
        """What the CRF takes on the largest tile. Raises CrfError where no engine is installed."""
        if self.crf is None or self.density is None:
            return CrfMemory(host=0, engine=0)
        named = replace(self.crf, engine=pick_engine(self.crf.engine, device=device))
        return crf_memory(costs.scored, named, self.density, classes=len(self.bundle.classes))

    def peak_bytes(self, costs: Costs, *, workers: int, device: Device) -> int:
        """Predicted peak of the host's memory, driver and ``workers`` together."""
        tile = costs.largest.host_bytes + self._weight_bytes(costs)
        if self.info.ndim == 2:  # volumes are mapped into memory, or unpacked first
            tile += costs.cache_bytes
        crf = self._crf_memory(costs, device)
        tile += crf.host
        if device == "cpu":
            tile += costs.largest.device_bytes + crf.engine
        return self.driver_bytes + min(workers, costs.tiles) * (WORKER_BYTES + tile)

    def _device_bytes(self, costs: Costs, device: Device) -> int:
        """Predicted peak of the memory of a GPU."""
        engine = self._crf_memory(costs, device).engine
        return costs.largest.device_bytes + engine + self._weight_bytes(costs)

    def _weight_bytes(self, costs: Costs) -> int:
        """Samples are computed by the network as it is, beside the one in stages."""
        return self.traced.weight_bytes * (1 + bool(costs.sample_work))

    def choose(
        self, asked: int | None, team: Team, *, precision: Precision, budget: Budget
    ) -> Choice:
        """The tile asked for, or the smallest that takes nearly the least time within the budget.

        A small tile is redone, retried and reported sooner. Where none fits, what takes least.
        """
        stride = self.reach.stride
        auto = (-(-side // stride) * stride for side in AUTO_TILES[self.info.ndim])
        sides = tuple(auto) if asked is None else (asked,)
        choices = [
            choice
            for side in sides
            for choice in self._in_windows(self._side(side), team, precision, budget)
        ]
        fitting = [choice for choice in choices if choice.fits]
        if not fitting:
            return min(choices, key=lambda choice: choice.taken)
        least = min(choice.span for choice in fitting)
        return next(choice for choice in fitting if choice.span <= NEAR_BEST * least)

    def _in_windows(
        self, tile: Shape, team: Team, precision: Precision, budget: Budget
    ) -> Iterator[Choice]:
        """Such tiles with windows that are the smaller, until they fit."""
        for hosted, window, slower in self._ways(precision, team.device):
            sizer = replace(self, window=window, hosted=hosted)
            sweep = sizer.sweep(tile, case="")
            costs = sizer.costs(sweep, precision)
            # A tile of the smallest size is soon done by one thread, in a batch as well. And
            # where any tile shall give the same bytes, it must not decide the threads. Of all tiles
            # that there are, so that an area does not decide them either.
            same = max(tile) <= AUTO_TILES[self.info.ndim][0] or self.canonical_px is not None
            own = team if same else team.for_tiles(len(sweep.grid))
            peak = self.peak_bytes(costs, workers=own.workers, device=team.device)
            device = 0 if budget.device is None else self._device_bytes(costs, team.device)
            choice = Choice(
                tile=tile,
                window=window,
                hosted=hosted,
                team=own,
                span=slower * costs.span(own),
                taken=peak + device,
                fits=peak <= budget.host and device <= (budget.device or 0),
            )
            yield choice
            maps = own.workers * costs.largest.device_bytes * (team.device == "cpu")
            if choice.fits or peak - maps > budget.host:  # which no window would make fit
                return

    def _ways(self, precision: Precision, device: Device) -> Iterator[tuple[bool, int, float]]:
        """Where maps may be held, and windows, the best first, and how much slower each is."""
        if self.canonical_px is not None or isinstance(self.traced.body, Trial):
            yield False, self.window, 1.0
            return
        widest = max(self.traced.body.channels.values()) * precision.dtype.itemsize
        for hosted in (False, True) if device == "cuda" else (False,):
            for window, slower in WINDOWS[device].items():
                wide = window**2 * widest > WIDE_BYTES and window > min(WINDOWS[device])
                if device == "cpu" and self.info.ndim == 2 and wide:
                    continue
                yield hosted, window, slower * (HOSTED if hosted else 1.0)

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
