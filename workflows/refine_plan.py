"""What ``refine`` will run: scores and image held against each other, tiles, engine, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pipeline.crf.density import Density, density_of
from pipeline.crf.engine import Device, EngineName, pick_engine
from pipeline.crf.memory import crf_memory
from pipeline.crf.params import CrfParams, ResolvedCrf
from pipeline.crf.whole_scene import SceneCrf
from pipeline.domain import Grid, ImageInfo, Pass, Reach, SamplePass, Shape, TilePlan
from pipeline.errors import PlanError, SourceError
from pipeline.models.input_spec import Legend
from pipeline.ports import Source
from pipeline.refine_scene import rounds_of
from pipeline.stitching.given_scores import check_scores
from workflows.case import Case
from workflows.config import RefineOptions
from workflows.costs import (
    DRIVER_BYTES,
    PLANNING_BYTES,
    WORKER_BYTES,
    Team,
    over_budget,
)
from workflows.lattice_size import LatticeSize, expected_lattice
from workflows.legend import read_legend
from workflows.plan_json import samples_before
from workflows.resolved import versions_here
from workflows.run_dir import canonical_digest
from workflows.run_scores import open_scores
from workflows.same_grid import check_same_grid
from workflows.workplace import usual_workers, workers, workplace

TILE_PX = {2: 1024, 3: 128}
"""Side of a tile where none is asked for, by number of axes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is to be refined, and how."""

    case: Case
    scores: Source
    scores_path: Path
    crf: CrfParams

    classes: Path | Legend | None
    """Or a YAML file with a list of them; None: names from the scores' bands, ids from 0."""

    def check_unchanged(self, scores_digest: str) -> None:
        """Raise SourceError where image or scores are others than when the run began."""
        self.case.check_unchanged()
        found, _ = open_scores(self.scores_path, self.case, scratch=None)
        if found.digest() != scores_digest:
            raise SourceError(
                f"{self.scores_path} has changed while it was read, so that a mask would be of two"
                " sets of scores: put back what it was and run the same command again, or start"
                " over with --fresh"
            )

    @property
    def legend(self) -> Legend:
        """The classes in the order of the scores' bands. Raises BundleError or PlanError."""
        if isinstance(self.classes, Legend):
            return self.classes
        return read_legend(self.classes, self.scores.info.channels)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fitted:
    """A wish that can be met."""

    crf: ResolvedCrf
    legend: Legend

    content: Mapping[str, Any]
    """What the result depends on."""

    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineResolved:
    """Values that ``auto`` became; kept in plan.json and used again on resume."""

    tile: Shape
    device: Literal["cpu", "cuda"]
    threads: int
    engine: EngineName
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinePlan:
    """Everything that is known before the first tile is read."""

    tiles: TilePlan
    resolved: RefineResolved
    crf: ResolvedCrf
    legend: Legend
    request_digest: str
    source_digest: str
    scores_digest: str
    workers: int

    density: Density
    """Of the image, as the CRF sees it: memory follows it."""

    lattice: LatticeSize | None
    """Expected of the lattice under all tiles; None where each tile has its own."""

    asked: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def sweep(self) -> Pass:
        """The pass that writes the mask."""
        return self.rounds[-1]

    @property
    def rounds(self) -> tuple[Pass, ...]:
        """Those of the lattice under all tiles, and last the pass that writes the mask."""
        return tuple(p for p in self.tiles.passes if isinstance(p, Pass))

    @property
    def scene(self) -> SceneCrf:
        """The mean field of the scene, where one lattice lies under all tiles."""
        return SceneCrf(grid=self.sweep.grid, params=self.crf)

    @property
    def one_piece(self) -> bool:
        """True when no tile's CRF ends where the image goes on."""
        return self.lattice is not None or len(self.sweep) == 1

    @property
    def samples(self) -> SamplePass:
        """The pass that computes samples again, for the certificate."""
        return next(p for p in self.tiles.passes if isinstance(p, SamplePass))

    @property
    def summary(self) -> str:
        """One line for people, before the run."""
        side = " x ".join(map(str, self.sweep.grid.tile))
        tiles = f"{len(self.sweep)} tiles of {side} px, {len(self.legend.classes)} classes, CRF by"
        if self.lattice is not None:
            return (
                f"{tiles} one lattice under all of them; each is visited {len(self.rounds)} times,"
                f" {self.lattice.visits}; expected:"
                f" {self.lattice.vertices / 1e6:.1f} million vertices,"
                f" {self.lattice.sent_bytes / 1e9:.2f} GB from tile to tile,"
                f" {self.lattice.kept_bytes / 1e9:.2f} GB in the run directory,"
                f" {self.tiles.peak_bytes / 1e9:.1f} GB of memory"
            )
        return (
            f"{tiles} {self.resolved.engine} on {self.resolved.device} with a halo of"
            f" {self.sweep.crf_halo.largest} px, work {self.sweep.read_ratio:.2f} times that of one"
            " pass"
        )

    def as_json(self) -> dict[str, Any]:
        """What plan.json holds."""
        rounds = {"rounds": [sweep.name for sweep in self.rounds]}
        return {
            "fingerprint": self.tiles.fingerprint,
            "request_digest": self.request_digest,
            "source_digest": self.source_digest,
            "scores_digest": self.scores_digest,
            "resolved": asdict(self.resolved),
            "case": self.sweep.case,
            "shape": self.sweep.grid.shape,
            "tile": self.sweep.grid.tile,
            "tiles": len(self.sweep),
            "crf_halo": self.sweep.crf_halo.before,
            "halo_work_ratio": round(self.sweep.read_ratio, 4),
            "workers": self.workers,
            "peak_memory_bytes": self.tiles.peak_bytes,
            "lattice": None if self.lattice is None else asdict(self.lattice) | rounds,
            "store_bytes": self.tiles.store_bytes,
            "crf": self.crf.as_json(),
            "crf_density": self.density.as_json(),
            "classes": [asdict(look) for look in self.legend.classes],
            "samples": [asdict(sample) for sample in self.samples.samples],
            "asked": self.asked,
            "notes": self.notes,
        }


def make_refine_plan(
    wish: Wish, options: RefineOptions, *, found: Mapping[str, Any] | None
) -> RefinePlan:
    """Decide everything before anything runs.

    ``found`` is the plan.json of an earlier run in the same directory.

    Raises SourceError, BundleError, CrfError or PlanError, one line each.
    """
    fitted, info = _fit(wish), wish.case.source.info
    request = canonical_digest({**fitted.content, "tile": options.tile, "device": options.device})
    if found is None or found["request_digest"] != request:
        found = None
        wish.case.source.unpack()  # a volume that is cut short is found before any tile is
        wish.scores.unpack()
        resolved = _resolve(fitted.crf, info, options)
    else:
        resolved = _resolved_before(found["resolved"])
    crf = replace(fitted.crf, engine=resolved.engine)
    crf.check_classes(len(fitted.legend.classes))
    crf.check_extent(info.shape)
    sweep = _sweep(crf, info, resolved.tile, case=wish.case.name)
    count = min(len(sweep), workers(options, device=resolved.device, threads=resolved.threads))
    content = {**fitted.content, "resolved": asdict(resolved)}
    tiles = _tile_plan(wish, sweep, content, found=found)
    density = density_of(wish.case.source, crf, tile=resolved.tile)
    held = _worker_bytes(wish, tiles, crf, density, device=resolved.device)
    tiles, lattice = replace(tiles, peak_bytes=tiles.peak_bytes + count * held), None
    if crf.scope == "scene":
        scene = SceneCrf(grid=sweep.grid, params=crf)
        expected = expected_lattice(density, sweep, scene, classes=len(fitted.legend.classes))
        peak = tiles.peak_bytes + count * expected.tile_bytes
        lattice = expected.with_room(options, peak_bytes=peak, workers=count)
        tiles = replace(
            tiles,
            passes=(*rounds_of(sweep, scene), *tiles.passes[1:]),
            peak_bytes=peak + count * lattice.room_bytes,
        )
    notes = over_budget(
        tiles.peak_bytes,
        asked=options.memory_budget,
        here=workplace(options).memory_bytes,
        workers=count,
        tile=resolved.tile,
    )
    return RefinePlan(
        tiles=tiles,
        resolved=resolved,
        crf=crf,
        legend=fitted.legend,
        request_digest=request,
        source_digest=wish.case.digest,
        scores_digest=fitted.content["scores"],
        workers=count,
        density=density,
        lattice=lattice,
        asked=_asked(wish),
        notes=fitted.notes + density.notes + notes,
    )


def _fit(wish: Wish) -> _Fitted:
    """Hold image, scores, classes and energy against one another."""
    info, scores = wish.case.source.info, wish.scores.info
    check_scores(scores, name=str(wish.scores_path))
    names = f"{wish.case.path} and {wish.scores_path}"
    notes = info.notes + check_same_grid(info, scores, names=names)
    legend = wish.legend
    crf = wish.crf.resolve(info.spacing, unit=info.unit, channels=info.channels)
    content = {
        "source": wish.case.digest,
        "scores": wish.scores.digest(),
        "crf": crf.as_json(),
        "classes": asdict(legend),
    }
    return _Fitted(crf=crf, legend=legend, content=content, notes=notes)


def _resolve(crf: ResolvedCrf, info: ImageInfo, options: RefineOptions) -> RefineResolved:
    place = workplace(options)
    device: Literal["cpu", "cuda"] = "cuda" if options.device == "cuda" else "cpu"
    if crf.scope == "scene" and device == "cuda":
        raise PlanError(
            "--device cuda asked with crf.scope scene, whose lattice the native engine of the CPU"
            " computes; leave out --device"
        )
    if options.device == "auto" and place.gpus and crf.scope == "tile":
        device = "cuda"
    if device == "cuda" and place.here and not torch.cuda.is_available():
        raise PlanError("--device cuda: torch sees no CUDA device here; use --device cpu")
    side = options.tile or TILE_PX[info.ndim]
    tile = tuple(min(side, n) for n in info.shape)
    threads = -(-place.cores // 8) if device == "cpu" else min(4, place.cores)
    usual = usual_workers(place, device=device, threads=threads)
    team = Team(workers=usual, threads=threads, device=device, alone=True)
    engine = pick_engine(crf.engine, device=device)
    return RefineResolved(
        tile=tile,
        device=device,
        threads=team.for_tiles(len(Grid(shape=info.shape, tile=tile, stride=1))).threads,
        engine=engine,
        versions=versions_here(engine),
    )


def _resolved_before(found: Mapping[str, Any]) -> RefineResolved:
    """The values of an interrupted run, with today's versions: other ones are another run."""
    try:
        before = RefineResolved(**{**found, "tile": tuple(found["tile"])})
    except (KeyError, TypeError) as error:
        raise PlanError(
            f"plan.json is damaged: 'resolved' holds {found!r}; start over with --fresh"
        ) from error
    pick_engine(before.engine, device=before.device)
    return replace(before, versions=versions_here(before.engine))


def _sweep(crf: ResolvedCrf, info: ImageInfo, tile: Shape, *, case: str) -> Pass:
    """The pass that writes the mask; there is no network, so that the CRF's halo is all."""
    none = replace(crf.halo_px, before=(0,) * info.ndim, after=(0,) * info.ndim)
    return Pass(
        case=case,
        name="segment",
        grid=Grid(shape=info.shape, tile=tile, stride=1),
        reach=Reach(stride=1, halo=none),
        crf_halo=crf.halo_px,
    )


def _tile_plan(
    wish: Wish, sweep: Pass, content: Mapping[str, Any], *, found: Mapping[str, Any] | None
) -> TilePlan:
    """The passes, their name, and what they take without workers.

    ``content`` is all that decides the bytes; samples stay where an earlier run had them.
    """
    fingerprint, reach = canonical_digest({**content, "sweep": asdict(sweep)}), sweep.reach
    if wish.crf.scope == "scene":  # more context than all of the scene there is none
        samples = SamplePass.at(sweep, reach=reach, samples=())
    elif found is not None:
        samples = SamplePass.at(sweep, reach=reach, samples=samples_before(found))
    else:
        samples = SamplePass.of(sweep, reach=reach, seed=fingerprint, wanted=wish.case.labelled)
    mask_bytes = np.dtype(wish.legend.dtype).itemsize
    return TilePlan(
        passes=(sweep, samples),
        fingerprint=fingerprint,
        peak_bytes=DRIVER_BYTES + PLANNING_BYTES,
        store_bytes=math.prod(wish.case.source.info.shape) * mask_bytes,
    )


def _worker_bytes(
    wish: Wish, tiles: TilePlan, crf: ResolvedCrf, density: Density, *, device: Device
) -> int:
    """What a worker holds in the host's memory, with the largest tile or sample."""
    image, scores = wish.case.source.info, wish.scores.info
    classes = len(scores.channels)
    sweep, samples = tiles.passes
    reads = [tile.read for tile in samples.tiles()]
    if isinstance(sweep, Pass):
        reads += [tile.read for tile, _ in sweep.kinds()]
    largest = max(reads, key=lambda read: read.size)
    guide = len(image.channels) * np.dtype(image.dtype).itemsize + 1
    given = classes * (np.dtype(scores.dtype).itemsize + 4)
    # One is read while another is refined, and a third written.
    tile = largest.size * (2 * (guide + given) + classes * 4)
    taken = crf_memory(largest.shape, crf, density, classes=classes)
    return WORKER_BYTES + tile + taken.host + (device == "cpu") * taken.engine


def _asked(wish: Wish) -> Mapping[str, Any]:
    return {
        "source": str(wish.case.path),
        "volume": wish.case.volume,
        "series": wish.case.series,
        "scores": str(wish.scores_path),
        "classes": str(wish.classes) if isinstance(wish.classes, Path) else None,
    }
