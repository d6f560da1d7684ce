"""What ``auto`` becomes: device, floats, threads and tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from pipeline.crf.engine import EngineName, pick_engine
from pipeline.domain import Shape
from pipeline.errors import ExecutionError, PlanError
from pipeline.execution.identity import package_digest
from pipeline.inference.precision import Precision, resolve_precision
from pipeline.models.bundle import CustomArchitecture
from pipeline.models.custom_code import code_version
from workflows.config import SegmentOptions
from workflows.costs import Budget, Team
from workflows.short_halo import HaloTrial
from workflows.workplace import usual_workers, workplace

if TYPE_CHECKING:
    from pipeline.models.context_pool import Context
    from workflows.sizing import Sizer

SHARE = 0.7
"""Of the memory of a machine or a GPU: what ``auto`` takes where no budget was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """Values that ``auto`` became; kept in plan.json and used again on resume."""

    tile: Shape
    device: Literal["cpu", "cuda"]
    precision: Precision
    threads: int
    context: Context

    average: str
    """As asked: none, or the sizes and the axes of mirror images."""

    output_stride: int
    """Of the network, in pixels."""

    halo: HaloTrial | None
    """The one that ``auto:TOL`` became; None for the exact halo, and for one that was given."""

    canonical_px: int | None

    window: int
    """Side of a window, in features, where windows are rows of the tile."""

    hosted: bool
    """Whether feature maps are held in the memory of the host, beside a GPU."""

    crf_engine: EngineName | None
    """Who computes the CRF; None where there is none."""

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
class Floats:
    """What computes, and how; the same for every case."""

    device: Literal["cpu", "cuda"]
    precision: Precision
    threads: int


def resolve_floats(options: SegmentOptions) -> Floats:
    """Device, precision and threads of a worker. Raises PlanError where a wish cannot be met."""
    import torch

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
    choice = sizer.choose(
        options.tile,
        Team(workers=usual, threads=floats.threads, device=floats.device, alone=alone),
        precision=floats.precision,
        budget=Budget(
            host=options.memory_budget or int(SHARE * place.memory_bytes),
            device=place.gpu_bytes and int(SHARE * place.gpu_bytes),
        ),
    )
    engine = pick_engine(sizer.crf.engine, device=floats.device) if sizer.crf else None
    return Resolved(
        tile=choice.tile,
        device=floats.device,
        precision=floats.precision,
        threads=choice.team.threads,
        context=options.context,
        average=options.average,
        output_stride=sizer.bundle.architecture.output_stride,
        halo=halo,
        canonical_px=sizer.canonical_px,
        window=choice.window,
        hosted=choice.hosted,
        crf_engine=engine,
        versions=_versions(sizer, engine),
    )


def resolved_before(found: Mapping[str, Any], options: SegmentOptions, sizer: Sizer) -> Resolved:
    """The values of an interrupted run, with today's versions: other ones are another run.

    Raises PlanError, CrfError or ExecutionError when this machine cannot honour them.
    """
    before = Resolved.from_json(found)
    if before.crf_engine is not None:
        pick_engine(before.crf_engine, device=before.device)
    before = replace(before, versions=_versions(sizer, before.crf_engine))
    place = workplace(options)
    if before.device == "cuda" and place.here and not place.gpus:
        raise ExecutionError("the run was begun on CUDA, torch sees no such device here; --fresh")
    if place.here:
        resolve_precision(before.precision.name, device=before.device)
    return before


def versions_here(engine: EngineName | None) -> dict[str, str]:
    """Of what decides the bytes of a result."""
    names = ["terravox", "torch", "numpy", "rasterio", "nibabel"]
    names += ["pydensecrf2"] if engine == "pydensecrf" else []
    return {name: version(name) for name in names} | {"code": package_digest()[:16]}


def _versions(sizer: Sizer, engine: EngineName | None) -> dict[str, str]:
    """``versions_here``, and that of somebody's own code."""
    found = versions_here(engine)
    architecture = sizer.bundle.architecture
    if isinstance(architecture, CustomArchitecture) and architecture.entry_point:
        found |= code_version(architecture.entry_point)
    return found
