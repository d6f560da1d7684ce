"""Which halo a command means, and what it is worth."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.domain import Reach
from pipeline.errors import PlanError
from pipeline.inference.average import averaged
from pipeline.inference.predictor import Predictor
from pipeline.models.bundle import Bundle
from workflows.case import Case
from workflows.config import SegmentOptions
from workflows.resolved import resolve, resolve_floats
from workflows.short_halo import HaloTrial, Sampler, short_reach, shortest_halo
from workflows.sizing import Sizer
from workflows.tracing import Traced


def reach_asked(exact: Reach, options: SegmentOptions, trial: HaloTrial | None) -> Reach:
    """What is read around a tile."""
    if options.halo.isdecimal():
        return short_reach(exact, int(options.halo))
    return short_reach(exact, trial.halo) if trial else exact


def check_average(options: SegmentOptions, bundle: Bundle) -> None:
    """Raise PlanError where the mean of the scene would be taken for that of another."""
    if options.average != "none" and options.context == "scene" and bundle.architecture.pools:
        raise PlanError(
            f"--average {options.average} needs --context window or tile: the mean of a scene is"
            " not that of its mirror image, nor of the scene at another size"
        )


def is_exact(known: Traced, *, reach: Reach) -> bool:
    """Whether tiling with this ``reach`` changes nothing but roundings."""
    exact = known.reach
    enough = (exact.halo | reach.halo) == reach.halo and exact.window is None
    return known.exact and (reach == exact or enough)


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
    resolved = resolve(options, sizer, halo=None, alone=False)
    predictor = Predictor(
        bundle,
        device=floats.device,
        precision=floats.precision,
        context=options.context,
        threads=floats.threads,
        window=resolved.window,
        hosted=resolved.hosted,
    )
    sampler = Sampler(
        source=case.source,
        channels=channels,
        scaling=bundle.input.scaling,
        predictor=averaged(predictor, sizer.traced.average),
        sweep=replace(sizer, crf=None).sweep(resolved.tile, case=""),
    )
    return shortest_halo(sampler, tolerance=tolerance)


def halo_notes(
    trial: HaloTrial | None, options: SegmentOptions, *, reach: Reach
) -> tuple[str, ...]:
    """What was measured, or rounded up, for people."""
    if options.halo_tolerance is None:
        short = options.halo.isdecimal() and int(options.halo) < reach.halo.largest
        word = f"--halo {options.halo}: {reach.halo.largest} px, a multiple of the output stride"
        return (word,) if short else ()
    if trial is None:
        return (f"--halo {options.halo}: no shorter halo than the exact one was shown to do",)
    found = f"{trial.differ} of {trial.pixels} labels in corners of tiles differ"
    bound = f"below {trial.upper_95:.1e}, with 95 % confidence"
    return (f"halo {trial.halo} px was measured: {found} from the exact halo's ({bound})",)
