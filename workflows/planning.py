"""From what was asked to what will run: every ``auto`` becomes a value, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, Literal

import torch

from pipeline.crf.params import ResolvedCrf
from pipeline.domain import Pass, Reach, SamplePass, Shape, TilePlan
from pipeline.errors import ExecutionError, PlanError, SourceError
from pipeline.execution.identity import package_digest
from pipeline.inference.precision import Precision, resolve_precision
from pipeline.inference.predictor import Predictor
from pipeline.models.bundle import Bundle
from pipeline.models.context_pool import Context
from workflows.case import Case
from workflows.config import SegmentOptions
from workflows.crf_asked import resolve_crf
from workflows.fitting import check_modality, check_spacing, match_channels
from workflows.plan_json import halo_json, windows_json, windows_words
from workflows.run_dir import canonical_digest
from workflows.short_halo import HaloTrial, Sampler, short_reach, shortest_halo
from workflows.sizing import Budget, Costs, Sizer, Team, canonical_side, over_budget, store_bytes
from workflows.tracing import traced
from workflows.workplace import usual_workers, workers, workplace


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """Values that ``auto`` became; kept in plan.json and used again on resume."""

    tile: Shape
    device: Literal["cpu", "cuda"]
    precision: Precision
    threads: int
    context: Context

    halo: HaloTrial | None
    """The one that ``auto:TOL`` became; None for the exact halo, and for one that was given."""

    canonical_px: int | None
    versions: Mapping[str, str]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Resolved:
        """The values as plan.json holds them. Raises PlanError when they are damaged."""
        try:
            precision = Precision(**values["precision"])
            halo = HaloTrial(**values["halo"]) if values["halo"] else None
            known = {"tile": tuple(values["tile"]), "precision": precision, "halo": halo}
            return cls(**{**values, **known})
        except (KeyError, TypeError) as error:
            raise PlanError(
                f"plan.json is damaged: 'resolved' holds {values!r}; start over with --fresh"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentPlan:
    """Everything that is known before the first tile is read."""

    tiles: TilePlan
    resolved: Resolved
    request_digest: str
    """SHA-256 of source, bundle and options as asked: does a command mean this run?"""

    source_digest: str
    channels: tuple[int, ...]
    crf: ResolvedCrf | None
    network_exact: bool
    """True when the halo covers the receptive field and pooling does not depend on the tile."""

    receptive_field: Shape
    """Of a coarse logit, in pixels; image pooling left out."""

    stages: int
    """That the network was taken apart into."""

    costs: Costs
    workers: int

    asked: Mapping[str, Any]
    """Where source and bundle lie, and the options: what ``certify`` needs to find them again."""

    notes: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """True when labels do not depend on the tile either: a CRF sees no more than one."""
        return self.network_exact and self.crf is None

    @property
    def sweep(self) -> Pass:
        """The pass that writes the mask."""
        return next(p for p in self.tiles.passes if isinstance(p, Pass) and p.name == "segment")

    @property
    def samples(self) -> SamplePass:
        """The pass that computes samples again, for the certificate."""
        return next(p for p in self.tiles.passes if isinstance(p, SamplePass))

    @property
    def summary(self) -> str:
        """One line for people, before the run."""
        sweep, resolved = self.sweep, self.resolved
        side = " x ".join(map(str, sweep.grid.tile))
        return (
            f"{len(sweep)} tiles of {side} px, halo {sweep.reach.halo_with_window.largest} px,"
            f" work {self.costs.halo_work_ratio:.2f} times that of one pass, {windows_words(self)},"
            f" {resolved.precision.name} on {resolved.device} ({resolved.precision.why}),"
            f" CRF {'on' if self.crf else 'off'}"
        )

    def as_json(self) -> dict[str, Any]:
        """What plan.json holds and ``terravox plan --json`` prints."""
        sweep = self.sweep
        return {
            "fingerprint": self.tiles.fingerprint,
            "request_digest": self.request_digest,
            "source_digest": self.source_digest,
            "resolved": asdict(self.resolved),
            "case": sweep.case,
            "shape": sweep.grid.shape,
            "padded_shape": sweep.grid.padded_shape,
            "output_stride": sweep.grid.stride,
            "tile": sweep.grid.tile,
            "tiles": len(sweep),
            "stages": self.stages,
            "halo": halo_json(sweep.reach),
            "crf_halo": sweep.crf_halo.before,
            "exact": self.exact,
            "receptive_field": self.receptive_field,
            **self.costs.as_json(),
            "workers": self.workers,
            "windows": windows_json(self),
            "peak_memory_bytes": self.tiles.peak_bytes,
            "store_bytes": self.tiles.store_bytes,
            "crf": asdict(self.crf) if self.crf else None,
            "channels": self.channels,
            "samples": [asdict(sample) for sample in self.samples.samples],
            "asked": self.asked,
            "notes": self.notes,
        }


def make_plan(
    case: Case,
    bundle: Bundle,
    options: SegmentOptions,
    *,
    found: Mapping[str, Any] | None = None,
    alone: bool = True,
) -> SegmentPlan:
    """Decide everything before anything runs.

    Args:
        case: what is to be segmented.
        bundle: with what.
        options: as asked.
        found: the plan.json of an earlier run in the same directory.
        alone: False where other cases share the workers, whose threads are then not this case's.

    Raises SourceError, BundleError, CrfError or PlanError, one line each.
    """
    info = case.source.info
    if info.ndim != bundle.architecture.dims:
        raise SourceError(
            f"{case.name} has {info.ndim} axes, but the network of {bundle.name} takes"
            f" {bundle.architecture.dims}: choose another bundle"
        )
    check_modality(info, bundle)
    channels, notes = match_channels(info, bundle)
    notes += check_spacing(info, bundle, any_resolution=options.any_resolution) + info.notes
    crf = resolve_crf(options.crf, bundle, info)
    request = canonical_digest(
        {
            "source": case.digest,
            "bundle": bundle.digest,
            "options": options.request(),
            "crf": asdict(crf) if crf else None,
        }
    )
    known = traced(bundle, options.context)
    sizer = Sizer(
        bundle=bundle,
        info=info,
        traced=known,
        reach=known.reach,
        crf=crf,
        canonical_px=canonical_side(options, bundle),
    )
    if found is not None and found["request_digest"] == request:
        resolved = _resolved_before(found["resolved"], options, crf=crf)
    else:
        trial = try_halos(case, options, sizer, channels)
        asked = replace(sizer, reach=reach_asked(known.reach, options, trial))
        resolved = resolve(options, asked, halo=trial, alone=alone)
    sizer = replace(sizer, reach=reach_asked(known.reach, options, resolved.halo))
    notes += _halo_notes(resolved.halo, options)
    sweep = sizer.sweep(resolved.tile, case=case.name)
    fingerprint = canonical_digest(
        {
            "source": case.digest,
            "bundle": bundle.digest,
            "resolved": asdict(resolved),
            "sweep": asdict(sweep),
            "crf": asdict(crf) if crf else None,
            "channels": channels,
            "scores": options.scores,
        }
    )
    # Of the layers, not as the options shorten it; pooling over a tile is held against a window's.
    whole = known if options.context == "scene" else traced(bundle, "window")
    samples = SamplePass.of(sweep, reach=whole.reach, seed=fingerprint)
    count = min(len(sweep), workers(options, device=resolved.device, threads=resolved.threads))
    costs = sizer.costs(sweep, resolved.precision)
    peak = sizer.peak_bytes(costs, workers=count, device=resolved.device)
    notes += over_budget(
        peak,
        asked=options.memory_budget,
        here=workplace(options).memory_bytes,
        workers=count,
        tile=resolved.tile,
    )
    return SegmentPlan(
        tiles=TilePlan(
            passes=(*sweep.with_context(), samples),
            fingerprint=fingerprint,
            peak_bytes=peak,
            store_bytes=store_bytes(bundle, sweep, scores=options.scores),
        ),
        resolved=resolved,
        request_digest=request,
        source_digest=case.digest,
        channels=channels,
        crf=crf,
        network_exact=is_exact(known.reach, bundle, options, reach=sizer.reach),
        receptive_field=known.receptive_field,
        stages=len(known.chain.stages),
        costs=costs,
        workers=count,
        asked={
            "source": str(case.path),
            "volume": case.volume,
            "series": case.series,
            "model": str(bundle.path),
            "options": options.request(),
        },
        notes=notes,
    )


def reach_asked(exact: Reach, options: SegmentOptions, trial: HaloTrial | None) -> Reach:
    """What is read around a tile."""
    if options.halo.isdecimal():
        return short_reach(exact, int(options.halo))
    return short_reach(exact, trial.halo) if trial else exact


def is_exact(exact: Reach, bundle: Bundle, options: SegmentOptions, *, reach: Reach) -> bool:
    """Whether tiling with this ``reach`` changes nothing but roundings."""
    local = options.context != "tile" or not bundle.architecture.image_pooling
    enough = (exact.halo | reach.halo) == reach.halo and exact.window is None
    return local and (reach == exact or enough)


def try_halos(
    case: Case, options: SegmentOptions, sizer: Sizer, channels: tuple[int, ...]
) -> HaloTrial | None:
    """What ``--halo auto:TOL`` becomes; None for the exact halo, and where it is not asked for.

    Raises PlanError where nothing can be measured here, SourceReadError.
    """
    tolerance, bundle = options.halo_tolerance, sizer.bundle
    if tolerance is None:
        return None
    floats = resolve_floats(options)
    if options.context != "window":
        raise PlanError(f"--halo auto needs --context window, got {options.context}")
    if floats.device == "cuda" and not torch.cuda.is_available():
        raise PlanError("--halo auto is measured in this process, which sees no GPU: give a number")
    predictor = Predictor(
        bundle,
        device=floats.device,
        precision=floats.precision,
        context=options.context,
        threads=floats.threads,
    )
    tile = resolve(options, sizer, halo=None, alone=False).tile
    sampler = Sampler(
        source=case.source,
        channels=channels,
        scaling=bundle.input.scaling,
        predictor=predictor,
        sweep=replace(sizer, crf=None).sweep(tile, case=""),
    )
    return shortest_halo(sampler, tolerance=tolerance)


def _halo_notes(trial: HaloTrial | None, options: SegmentOptions) -> tuple[str, ...]:
    if options.halo_tolerance is None:
        return ()
    if trial is None:
        return (f"--halo {options.halo}: no shorter halo than the exact one was shown to do",)
    found = f"{trial.differ} of {trial.pixels} labels in corners of tiles differ"
    bound = f"below {trial.upper_95:.1e}, with 95 % confidence"
    return (f"halo {trial.halo} px was measured: {found} from the exact halo's ({bound})",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Floats:
    """What computes, and how; the same for every case."""

    device: Literal["cpu", "cuda"]
    precision: Precision
    threads: int


def resolve_floats(options: SegmentOptions) -> Floats:
    """Device, precision and threads of a worker. Raises PlanError where a wish cannot be met."""
    place = workplace(options)
    device: Literal["cpu", "cuda"] = "cuda" if options.device == "cuda" else "cpu"
    if options.device == "auto" and place.gpus:
        device = "cuda"
    if device == "cuda" and place.here and not place.gpus:
        raise PlanError("--device cuda: torch sees no CUDA device here; use --device cpu")
    threads = -(-place.cores // 8) if device == "cpu" else min(4, place.cores)
    seen = place.here or device == "cpu" or torch.cuda.is_available()
    if seen or options.precision == "fp32":
        precision = resolve_precision(options.precision, device=device)
    else:
        why = f"{options.precision}: taken for granted of the cluster's cards; others refuse"
        precision = Precision(name="bf16", channels_last=True, why=why)
    return Floats(device=device, precision=precision, threads=threads)


def resolve(
    options: SegmentOptions, sizer: Sizer, *, halo: HaloTrial | None, alone: bool
) -> Resolved:
    """Turn every ``auto`` into a value. Raises PlanError where a wish cannot be met."""
    floats, place = resolve_floats(options), workplace(options)
    # Not the workers asked for: their number must not change the bytes.
    usual = usual_workers(place, device=floats.device, threads=floats.threads)
    tile, team = sizer.choose(
        options.tile,
        Team(workers=usual, threads=floats.threads, device=floats.device, alone=alone),
        precision=floats.precision,
        budget=Budget(
            host=options.memory_budget or place.memory_bytes // 2, device=place.gpu_bytes
        ),
    )
    return Resolved(
        tile=tile,
        device=floats.device,
        precision=floats.precision,
        threads=team.threads,
        context=options.context,
        halo=halo,
        canonical_px=sizer.canonical_px,
        versions=_versions(sizer.crf),
    )


def _resolved_before(
    found: Mapping[str, Any], options: SegmentOptions, *, crf: ResolvedCrf | None
) -> Resolved:
    """The values of an interrupted run, with today's versions: other ones are another run.

    Raises PlanError or ExecutionError when this machine cannot honour them.
    """
    before = replace(Resolved.from_json(found), versions=_versions(crf))
    place = workplace(options)
    if before.device == "cuda" and place.here and not place.gpus:
        raise ExecutionError("the run was begun on CUDA, torch sees no such device here; --fresh")
    if place.here:
        resolve_precision(before.precision.name, device=before.device)
    return before


def _versions(crf: ResolvedCrf | None) -> dict[str, str]:
    names = ["terravox", "torch", "numpy", "rasterio", "nibabel"] + (["pydensecrf2"] if crf else [])
    return {name: version(name) for name in names} | {"code": package_digest()[:16]}
