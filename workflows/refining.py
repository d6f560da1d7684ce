"""``refine``: somebody's scores to a mask, by the dense CRF alone."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from adapters.mlflow_tracker import MlflowTracker, NoTracker
from adapters.uri import local_path, open_channels
from pipeline.crf.params import CrfParams
from pipeline.errors import PlanError, SourceError
from pipeline.execution.feed import FairFeed
from pipeline.ports import Guard
from pipeline.segment_image import segment_images
from workflows.backend import make_backend
from workflows.case import Case, case_of
from workflows.config import RefineOptions
from workflows.crf_asked import read_crf
from workflows.finish import check_output, finished
from workflows.interrupt import never
from workflows.manifest import (
    all_versions,
    classes,
    default_run_dir,
    lattice,
    nodata_pixels,
    peak_memory,
    stages,
    throughput,
    tile_counts,
)
from workflows.planned_once import planned_once
from workflows.progress import RunProgress, stderr_console
from workflows.publish import open_tracker
from workflows.refine_plan import Wish, make_refine_plan
from workflows.refine_run import RefineProduct, RefineRun
from workflows.run_dir import RunDir, file_digest, read_plan, write_json
from workflows.run_scores import open_scores

log = logging.getLogger(__name__)


def refine(
    source: str | Path,
    output: str | Path,
    *,
    scores: str | Path,
    crf: str | Path | CrfParams,
    legend: str | Path | None = None,
    options: RefineOptions | None = None,
    stop: Callable[[], bool] = never,
) -> dict[str, Any]:
    """Refine scores by the dense CRF; run again, it resumes; run once more, it does nothing.

    Args:
        source: the image that guides: a raster, or a volume; a 4-D NIfTI's volumes are channels.
        output: the mask: ``.tif`` for rasters, ``.nii`` or ``.nii.gz`` for volumes.
        scores: probabilities on the same grid: a band, or a volume of a 4-D NIfTI, for each
            class; floats from 0 to 1, or uint8 with 255 for 1. Or the run directory of
            ``segment`` with ``--scores`` and without CRF.
        crf: a YAML file with a ``crf`` part, such as a bundle's model.yaml, or the parameters.
        legend: a YAML file with a list ``classes``; otherwise those of the run that wrote the
            scores, or names from their bands.
        options: as ``terravox refine --help`` lists them.
        stop: asked between tiles; True drains the run.

    Returns:
        The manifest; ``status`` is done, partial or interrupted.

    Raises:
        PipelineError: one line that says what was asked, what was found and what to do.
    """
    asked, target = options or RefineOptions(), Path(output).absolute()
    run = RunDir((asked.run_dir or default_run_dir(target)).resolve())
    run.check_ours(batch=False)
    if run.path == Path(scores).resolve():
        raise PlanError(
            f"--run-dir {run.path} is that of the scores, and would no longer hold them: choose"
            " another output, or name another --run-dir"
        )
    case = _open_case(local_path(str(source)).absolute(), asked, run=run)
    given, own_legend = open_scores(Path(scores).absolute(), case, scratch=run.scratch)
    wish = Wish(
        case=case,
        scores=given,
        scores_path=Path(scores).absolute(),
        crf=crf if isinstance(crf, CrfParams) else read_crf(Path(crf)),
        classes=own_legend if legend is None else Path(legend),
    )
    check_output(target, source=wish.case.path, info=wish.case.source.info, run=run)
    if target.exists() and target.samefile(wish.scores_path):
        raise SourceError(f"output {target} is the scores themselves; choose another output")
    return planned_once(
        run,
        target,
        fresh=asked.fresh,
        plan=lambda: _planned_product(wish, asked, output=target, run=run),
        carry_out=lambda product, guard: _run(product, asked, guard=guard, stop=stop),
    )


def _planned_product(
    wish: Wish, asked: RefineOptions, *, output: Path, run: RunDir
) -> tuple[RefineProduct, dict[str, Any] | None]:
    """What is to be made, and the manifest where it is made already."""
    known, done = None if asked.fresh else read_plan(run), None
    plan = make_refine_plan(wish, asked, found=known)
    if output.exists() and not asked.fresh:
        done = finished(run, output, fingerprint=plan.tiles.fingerprint, known=known)
    return RefineProduct(wish=wish, plan=plan, output=output, run=run), done


def _open_case(path: Path, options: RefineOptions, *, run: RunDir) -> Case:
    source = open_channels(
        str(path), volume=options.volume, series=options.series, scratch=run.scratch
    )
    return case_of(source, path, options)


def _run(
    product: RefineProduct,
    options: RefineOptions,
    *,
    guard: Guard,
    stop: Callable[[], bool],
) -> dict[str, Any]:
    """Tiles, then the product, then the papers."""
    tracker = open_tracker(options, output=product.output, known=product.run.tracking)
    with closing(RefineRun(product, options, guard=guard)) as image:  # no other run's directory
        _start(tracker, product)
        try:
            _tiles(image, stop=stop)
            return _finish(image, tracker)
        except BaseException:
            tracker.finish("failed", artifacts=())
            raise


def _start(tracker: MlflowTracker | NoTracker, product: RefineProduct) -> None:
    """Open the tracker's run, or go on in the one that an interrupted run opened."""
    plan = product.plan
    tracker.start(
        params={key: str(value) for key, value in plan.as_json()["resolved"].items()},
        tags={
            "fingerprint": plan.tiles.fingerprint,
            "source": product.wish.case.path.name,
            "scores": product.wish.scores_path.name,
        },
    )
    if tracker.run_id:
        write_json(product.run.tracking, {"run_id": tracker.run_id})


def _tiles(image: RefineRun, *, stop: Callable[[], bool]) -> None:
    plan, console = image.plan, stderr_console()
    console.print(plan.summary)
    for note in plan.notes:
        log.warning("%s", note)
    done = len(image.tiles.outcome.records)
    progress = RunProgress(
        "tiles", total=len(plan.tiles), done=done, file=image.run.progress, console=console
    )
    image.tiles.observers.append(
        lambda r: progress.add(
            complaint=f"tile {r.key.number} failed: {r.error}" if r.status == "failed" else ""
        )
    )
    feed = FairFeed()
    feed.add(image.tiles.jobs())
    feed.close()
    with progress:
        if image.tiles.outcome.interrupted and not stop():
            backend = make_backend(
                image.options,
                device=plan.resolved.device,
                threads=plan.resolved.threads,
                workers=plan.workers,
                run_dir=image.run.path,
            )
            images = {plan.sweep.case: image.tiles}
            segment_images(feed, images, backend=backend, ended=lambda _: None, stop=stop)


def _finish(image: RefineRun, tracker: MlflowTracker | NoTracker) -> dict[str, Any]:
    """The product if its tiles allow it, then the papers; returns the manifest."""
    outcome, run = image.tiles.outcome, image.run
    failed = outcome.of(image.plan.sweep).failed
    seam = None
    if not outcome.interrupted and len(failed) <= image.options.allow_failed:
        seam = image.measure()
        image.write(seam)
    values = _manifest(image, seam=seam) | {"mlflow_run_id": tracker.run_id}
    tracker.metrics(
        {"seconds": values["seconds"]}
        | {f"pixels/{row['name']}": float(row["pixels"]) for row in values["classes"]},
        step=values["tiles"]["done"],
    )
    tracker.finish(values["status"], artifacts=[run.plan, *([run.certificate] if seam else [])])
    if tracker.error:
        values["notes"] = (*values["notes"], tracker.error)
    if seam is not None:
        write_json(run.manifest, values)
        for spent in (run.scratch, run.lattice):
            shutil.rmtree(spent, ignore_errors=True)
    return values


def _manifest(image: RefineRun, *, seam: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keys as in that of ``segment``, where they apply; ``seam`` None while there is no product."""
    plan, wish, product = image.plan, image.product.wish, image.product
    info, outcome = wish.case.source.info, image.tiles.outcome
    mask, seconds = outcome.of(plan.sweep), time.monotonic() - image.started
    return {
        "status": "interrupted" if outcome.interrupted else "partial" if mask.failed else "done",
        "output": str(product.output.resolve()) if seam else None,
        "output_sha256": file_digest(product.output) if seam else None,
        "fingerprint": plan.tiles.fingerprint,
        "request_digest": plan.request_digest,
        "source": {
            "uri": str(wish.case.path),
            "digest": plan.source_digest,
            "shape": info.shape,
            "crs": info.crs,
            "affine": info.affine,
            "selection": info.selection,
        },
        "scores": {"uri": str(wish.scores_path), "digest": plan.scores_digest},
        "tile": plan.sweep.grid.tile,
        "tiles": tile_counts(mask),
        "halo_work_ratio": round(plan.sweep.read_ratio, 4),
        "crf": {
            "engine": plan.resolved.engine,
            "scope": plan.crf.scope,
            "iterations": plan.crf.iterations,
            "halo": plan.sweep.crf_halo.before,
            "exact": plan.one_piece,
            "lattice": lattice(outcome),
        },
        "device": plan.resolved.device,
        "classes": classes(mask, info, plan.legend),
        "nodata_pixels": nodata_pixels(mask, plan.sweep, nodata=plan.legend.nodata),
        "seam": seam,
        "seconds": round(seconds, 3),
        "throughput": throughput(info, image.new, seconds),
        "stages": stages(image.new),
        "peak_memory_bytes": peak_memory(image.new),
        "versions": all_versions(plan.resolved.versions),
        "notes": plan.notes,
        "failed_tiles": [
            {"pass": r.key.stage, "tile": r.key.number, "error": r.error, "deaths": r.deaths}
            for r in outcome.failed
        ],
    }
