"""What a run takes, as its plan counts it: work, and the memory of its processes.

No torch here: the driver holds these values long after the network that they were counted from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pipeline.domain import Pass, Region, Shape, Tile, TileCost, Walk
from pipeline.errors import PlanError

if TYPE_CHECKING:
    from pipeline.inference.tile_cost import CostModel
    from pipeline.inference.whole_cost import WholeCostModel

THREAD_GAIN = 0.9
"""Two threads of a worker do the work of 2 to this power."""

DRIVER_BYTES = 700 * 2**20
PLANNING_BYTES = 450 * 2**20
AREA_BYTES = 100 * 2**20
WORKER_BYTES = 600 * 2**20
"""What processes hold beside their tiles (measured, PSS): the driver GDAL, MLflow and Ray, whose
daemons are 385 MiB of it; one that makes plans itself torch and what is left of weights as well;
one that reads polygons what pyogrio imports; a worker torch, GDAL and Ray."""


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
    """Multiply-adds of one pass over the whole scene, or its share of what the tiles cover."""

    sample_work: int
    """Multiply-adds of the certificate's samples."""

    largest: TileCost
    """The most that any tile takes, each figure by itself."""

    scored: Shape
    """Of the largest tile or sample that the CRF sees, in pixels."""

    read_ratio: float
    """Pixels that tiles read over those of the scene."""

    read_amplification: float
    """Pixels that are decoded over those of the scene: what neighbours share is remembered."""

    cache_bytes: int
    """Decoded blocks that a worker's reader comes back to while it walks a band of tiles."""

    @classmethod
    def of(cls, sweep: Pass, model: CostModel | WholeCostModel) -> Costs:
        """Counted over one tile of each kind."""
        from pipeline.inference.tile_cost import CostModel

        cost_of = model.of
        if isinstance(model, CostModel) and sweep.name == "context":
            cost_of = model.of_sums
        kinds = [(tile, cost_of(tile), alike) for tile, alike in sweep.kinds()]
        shape = sweep.grid.shape
        return cls(
            tiles=len(sweep),
            work=sum(cost.work * alike for _, cost, alike in kinds),
            scene_work=model.scene_work * sweep.covered_pixels // Region.whole(shape).size,
            sample_work=0,
            largest=_largest([cost for _, cost, _ in kinds]),
            scored=max((tile.scored.shape for tile, _, _ in kinds), key=math.prod),
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
            scored=max(self.scored, other.scored, key=math.prod),
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
            scored=max([self.scored, *(tile.scored.shape for tile in tiles)], key=math.prod),
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
