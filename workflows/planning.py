"""From what was asked to what will run: every ``auto`` becomes a value, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.crf.density import density_of
from pipeline.domain import Pass, SamplePass, TilePlan
from pipeline.errors import PlanError, SourceError
from pipeline.inference.predictor import WINDOW
from pipeline.models.bundle import Bundle
from pipeline.models.chain import Chain
from workflows.case import Case
from workflows.config import SegmentOptions
from workflows.costs import AREA_BYTES, DRIVER_BYTES, PLANNING_BYTES, over_budget
from workflows.crf_asked import over_image, resolve_crf, with_engine
from workflows.fitting import check_modality, check_spacing, match_channels
from workflows.halo_asked import (
    check_average,
    halo_notes,
    is_exact,
    reach_asked,
    try_halos,
)
from workflows.plan_json import samples_before
from workflows.resolved import Resolved, resolve, resolved_before
from workflows.run_dir import canonical_digest
from workflows.scene_plan import ScenePlan, plan_scene, refuse_scores
from workflows.segment_plan import SegmentPlan
from workflows.sizing import Sizer, canonical_side, store_bytes
from workflows.tracing import traced
from workflows.workplace import workers, workplace


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
    channels, notes = _fit(case, bundle, options)
    crf = resolve_crf(options.crf, bundle, info)
    request = canonical_digest(
        {
            "source": case.digest,
            "bundle": bundle.digest,
            # What the CRF's file says, not where it lies.
            "options": options.request() | {"crf": None},
            "crf": crf.as_json() if crf else None,
            "aoi": case.area.digest if case.area else None,
        }
    )
    if found is None or found["request_digest"] != request:
        found = None
        case.source.unpack()  # a scan that is cut short is found before any tile is
    under_all = crf if crf is not None and crf.scope == "scene" else None
    if under_all is not None:
        refuse_scores(options)
        if case.area is not None:
            raise PlanError("--aoi and a CRF of scope scene: give that of scope tile, or --crf off")
        crf = None
    density = None
    if crf is not None:
        density = density_of(case.source, over_image(crf, channels), tile=info.shape)
    check_average(options, bundle)
    known = traced(bundle, options.context).averaged(options.average)
    # Of the layers, not as the options shorten it; pooling over a tile is held against a window's.
    tile_pooled = options.context == "tile" and bundle.architecture.windowed
    whole = traced(bundle, "window").averaged(options.average) if tile_pooled else known
    sizer = Sizer(
        bundle=bundle,
        info=info,
        traced=known,
        reach=known.reach,
        whole=whole.reach,
        crf=crf,
        density=density,
        canonical_px=canonical_side(options, bundle),
        window=WINDOW,
        hosted=False,
        scores=options.scores != "none",
        area=case.area,
        # Cases that share workers are planned in the driver, while others run.
        driver_bytes=DRIVER_BYTES
        + (not alone) * PLANNING_BYTES
        + (case.area is not None) * AREA_BYTES,
    )
    if found is not None:
        resolved = resolved_before(found["resolved"], options, sizer)
    else:
        trial = try_halos(case, options, sizer, channels)
        asked = replace(sizer, reach=reach_asked(known.reach, options, trial))
        resolved = resolve(options, asked, halo=trial, alone=alone)
    crf = with_engine(crf, resolved.crf_engine, shape=info.shape, classes=len(bundle.classes))
    reach = reach_asked(known.reach, options, resolved.halo)
    sizer = replace(sizer, crf=crf, reach=reach, window=resolved.window, hosted=resolved.hosted)
    sweep = sizer.sweep(resolved.tile, case=case.name)
    scene = None
    if under_all is not None:
        image_crf = over_image(under_all, channels)
        density = density_of(case.source, image_crf, tile=resolved.tile)
        scene = plan_scene(image_crf, sweep, density, classes=len(bundle.classes))
    tiles = _tile_plan(case, options, sizer, resolved, channels, scene, found=found)
    if scene is not None:
        count, peak = _workers(options, sweep, resolved), tiles.peak_bytes
        scene = scene.with_room(options, peak_bytes=peak, workers=count)
        tiles = replace(tiles, peak_bytes=peak + count * scene.lattice.room_bytes)
    plan = SegmentPlan(
        tiles=tiles,
        resolved=resolved,
        request_digest=request,
        source_digest=case.digest,
        channels=channels,
        crf=crf,
        density=density,
        average=known.average,
        scene=scene,
        network_exact=is_exact(known, reach=sizer.reach),
        receptive_field=known.receptive_field,
        stages=len(known.body.stages) if isinstance(known.body, Chain) else 1,
        costs=sizer.costs(sweep, resolved.precision),
        workers=_workers(options, sweep, resolved),
        aoi=case.aoi.as_json() if case.aoi else None,
        asked=_asked(case, bundle, options),
        notes=notes
        + halo_notes(resolved.halo, options, reach=reach)
        + (density.notes if density else ())
        + (case.aoi.notes if case.aoi else ()),
    )
    return replace(plan, notes=plan.notes + _memory_notes(plan, options))


def _fit(
    case: Case, bundle: Bundle, options: SegmentOptions
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Index in the image of each band of the network, and notes. Raises SourceError, PlanError."""
    info = case.source.info
    if info.ndim != bundle.architecture.dims:
        raise SourceError(
            f"{case.name} has {info.ndim} axes, but the network of {bundle.name} takes"
            f" {bundle.architecture.dims}: choose another bundle"
        )
    check_modality(info, bundle)
    channels, notes = match_channels(info, bundle)
    notes += check_spacing(info, bundle, any_resolution=options.any_resolution) + info.notes
    return channels, notes


def _tile_plan(
    case: Case,
    options: SegmentOptions,
    sizer: Sizer,
    resolved: Resolved,
    channels: tuple[int, ...],
    scene: ScenePlan | None,
    *,
    found: Mapping[str, Any] | None,
) -> TilePlan:
    """The passes, their name, and what they take; samples stay where an earlier run had them."""
    bundle, crf = sizer.bundle, sizer.crf if scene is None else scene.crf.params
    sweep = sizer.sweep(resolved.tile, case=case.name)
    fingerprint = canonical_digest(
        {
            "source": case.digest,
            "bundle": bundle.digest,
            "resolved": asdict(resolved),
            "sweep": asdict(sweep),
            "crf": crf.as_json() if crf else None,
            "channels": channels,
            "scores": options.scores,
            "aoi": case.area.digest if case.area else None,
        }
    )
    count = _workers(options, sweep, resolved)
    peak = sizer.peak_bytes(
        sizer.costs(sweep, resolved.precision), workers=count, device=resolved.device
    )
    rounds = () if scene is None else scene.rounds
    if found is None:
        samples = SamplePass.of(sweep, reach=sizer.whole, seed=fingerprint, wanted=case.labelled)
    else:
        samples = SamplePass.at(sweep, reach=sizer.whole, samples=samples_before(found))
    if scene is not None:
        peak += count * scene.tile_bytes
    return TilePlan(
        passes=(*sweep.with_context(), *rounds, samples),
        fingerprint=fingerprint,
        peak_bytes=peak,
        store_bytes=store_bytes(bundle, sweep, scores=options.scores),
    )


def _workers(options: SegmentOptions, sweep: Pass, resolved: Resolved) -> int:
    """Workers that find something to do."""
    return min(len(sweep), workers(options, device=resolved.device, threads=resolved.threads))


def _asked(case: Case, bundle: Bundle, options: SegmentOptions) -> Mapping[str, Any]:
    crf = options.crf if options.crf in ("auto", "off") else str(Path(options.crf).absolute())
    return {
        "source": str(case.path),
        "volume": case.volume,
        "series": case.series,
        "aoi": str(case.aoi.path) if case.aoi else None,
        "model": str(bundle.path),
        "options": options.request() | {"crf": crf},
    }


def _memory_notes(plan: SegmentPlan, options: SegmentOptions) -> tuple[str, ...]:
    """Raises PlanError where more memory is taken than was asked for."""
    return over_budget(
        plan.tiles.peak_bytes,
        asked=options.memory_budget,
        here=workplace(options).memory_bytes,
        workers=plan.workers,
        tile=plan.resolved.tile,
    )
