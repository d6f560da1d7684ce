"""What one lattice under all tiles adds to the plan of a network: rounds over its scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pipeline.crf.density import Density
from pipeline.crf.memory import CrfMemory, crf_memory
from pipeline.crf.params import ResolvedCrf
from pipeline.crf.whole_scene import SceneCrf
from pipeline.domain import Grid, Halo, Pass, Reach
from pipeline.errors import PlanError
from pipeline.refine_scene import rounds_of
from pipeline.stitching.scores import ScoreType
from workflows.config import SegmentOptions
from workflows.lattice_size import LatticeSize, expected_lattice

SCORES: ScoreType = "float16"
"""How the network's probabilities are kept until the rounds have read them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenePlan:
    """The rounds, and what they take."""

    crf: SceneCrf

    rounds: tuple[Pass, ...]
    """After the network's pass; the last one writes the mask."""

    lattice: LatticeSize

    classes: int

    memory: CrfMemory
    """Of a tile's own pixels."""

    @property
    def kept_bytes(self) -> int:
        """The most that lies in the run directory until the end: scores, and what tiles told."""
        pixels = math.prod(self.crf.grid.shape)
        return pixels * self.classes * np.dtype(SCORES).itemsize + self.lattice.kept_bytes

    @property
    def tile_bytes(self) -> int:
        """Of a worker's memory, for the largest tile."""
        given = math.prod(self.crf.grid.tile) * self.classes * np.dtype(SCORES).itemsize
        return given + self.memory.host + self.memory.engine + self.lattice.tile_bytes

    def with_room(self, options: SegmentOptions, *, peak_bytes: int, workers: int) -> ScenePlan:
        """The same with what each worker may keep between rounds; see LatticeSize."""
        found = self.lattice.with_room(options, peak_bytes=peak_bytes, workers=workers)
        return replace(self, lattice=found)

    @property
    def summary(self) -> str:
        """What is added to the line for people."""
        return (
            f"CRF by one lattice under all tiles in {len(self.rounds)} rounds, tiles"
            f" {self.lattice.visits}, expected: {self.lattice.vertices / 1e6:.1f} million vertices,"
            f" {self.lattice.sent_bytes / 1e9:.2f} GB from tile to tile,"
            f" {self.kept_bytes / 1e9:.2f} GB of scores and sums until it is done"
        )

    def as_json(self) -> dict[str, Any]:
        """What plan.json holds."""
        rounds = [sweep.name for sweep in self.rounds]
        return asdict(self.lattice) | {"rounds": rounds, "kept_bytes": self.kept_bytes}

    def manifest(self, lattice: Mapping[str, int] | None) -> dict[str, Any]:
        """The manifest's ``crf``."""
        return {
            "engine": self.crf.params.engine,
            "scope": "scene",
            "iterations": self.crf.params.iterations,
            "halo": self.rounds[-1].crf_halo.before,
            "exact": True,
            "lattice": lattice,
        }


def plan_scene(crf: ResolvedCrf, sweep: Pass, density: Density, *, classes: int) -> ScenePlan:
    """The rounds over the tiles of ``sweep``, the network's pass.

    Args:
        crf: over the image.
        sweep: what writes the scores.
        density: of the image.
        classes: of the network.

    Raises CrfError.
    """
    crf.check_classes(classes)
    crf.check_extent(sweep.grid.shape)
    grid = Grid(shape=sweep.grid.shape, tile=sweep.grid.tile, stride=1)
    reach = Reach(stride=1, halo=Halo.uniform(0, ndim=len(grid.shape)))
    alone = replace(sweep, name="refine", grid=grid, reach=reach, after=sweep.name)
    scene = SceneCrf(grid=grid, params=crf)
    return ScenePlan(
        crf=scene,
        rounds=rounds_of(alone, scene),
        lattice=expected_lattice(density, alone, scene, classes=classes),
        classes=classes,
        memory=crf_memory(grid.tile, crf, density, classes=classes),
    )


def refuse_scores(options: SegmentOptions) -> None:
    """Scores beside one lattice are those of the network, for the rounds. Raises PlanError."""
    if options.scores != "none":
        raise PlanError(
            f"--scores {options.scores} asked with crf.scope scene, which leaves none: run with"
            f" --crf off --scores {options.scores}, then `terravox refine`"
        )
