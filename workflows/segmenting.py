"""``segment``: one raster or volume to a finished mask; the wiring of adapters and pipeline."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adapters.mlflow_tracker import import_for
from adapters.uri import local_path
from pipeline.execution.feed import FairFeed
from pipeline.models.bundle import Bundle
from pipeline.ports import Guard, Record
from pipeline.segment_image import segment_images
from workflows.backend import make_backend
from workflows.bundle_asked import bundle_asked
from workflows.case import Case, open_case
from workflows.config import SegmentOptions, ray_address, tracking_uri
from workflows.finish import Product, check_output, finished
from workflows.image_run import ImageRun
from workflows.interrupt import never
from workflows.manifest import default_run_dir
from workflows.plan_process import plan_apart
from workflows.planned_once import planned_once
from workflows.progress import RunProgress, stderr_console
from workflows.publish import Publisher, open_tracker
from workflows.run_dir import RunDir, read_plan
from workflows.segment_plan import SegmentPlan

log = logging.getLogger(__name__)


def segment(
    source: str | Path,
    output: str | Path,
    *,
    model: str | Path,
    options: SegmentOptions | None = None,
    stop: Callable[[], bool] = never,
) -> dict[str, Any]:
    """Segment one raster or volume; run again, it resumes; run once more, it does nothing.

    Args:
        source: a GeoTIFF, VRT, NIfTI, NRRD or MetaImage file, or the folder of a DICOM series.
        output: the mask: ``.tif`` for rasters, ``.nii`` or ``.nii.gz`` for volumes.
        model: a bundle directory.
        options: as ``terravox segment --help`` lists them.
        stop: asked between tiles; True drains the run.

    Returns:
        The manifest; ``status`` is done, partial or interrupted.

    Raises:
        PipelineError: one line that says what was asked, what was found and what to do.
    """
    asked = options or SegmentOptions()
    bundle = bundle_asked(model, asked)
    target = Path(output).absolute()
    run = RunDir((asked.run_dir or default_run_dir(target)).resolve())
    case = open_case(local_path(str(source)).absolute(), asked, scratch=run.scratch)
    run.check_ours(batch=False)
    check_output(target, source=case.path, info=case.source.info, run=run)
    return planned_once(
        run,
        target,
        fresh=asked.fresh,
        plan=lambda: _planned_product(case, bundle, asked, output=target, run=run),
        carry_out=lambda product, guard: _run(product, asked, guard=guard, stop=stop),
    )


def _planned_product(
    case: Case, bundle: Bundle, asked: SegmentOptions, *, output: Path, run: RunDir
) -> tuple[Product, dict[str, Any] | None]:
    """What is to be made, and the manifest where it is made already."""
    known, done = None if asked.fresh else read_plan(run), None
    case = case.within(asked.aoi, scratch=run.scratch)
    plan = _planned(case, bundle, asked, found=known)
    if output.exists() and not asked.fresh:
        done = finished(run, output, fingerprint=plan.tiles.fingerprint, known=known)
    return Product(case=case, bundle=bundle, plan=plan, output=output, run=run), done


def plan(
    source: str | Path, *, model: str | Path, options: SegmentOptions | None = None
) -> dict[str, Any]:
    """What ``segment`` would do, as plan.json would hold it, and how long the network would take.

    Raises what ``segment`` raises.
    """
    from workflows.calibration import network_seconds
    from workflows.planning import make_plan

    asked = options or SegmentOptions()
    bundle = bundle_asked(model, asked)
    with TemporaryDirectory() as scratch:  # a mask that is compressed is unpacked
        case = open_case(local_path(str(source)).absolute(), asked)
        made = make_plan(case.within(asked.aoi, scratch=Path(scratch)), bundle, asked)
    return made.as_json() | {"network_seconds": round(network_seconds(made, bundle), 1)}


def _planned(
    case: Case, bundle: Bundle, options: SegmentOptions, *, found: Mapping[str, Any] | None
) -> SegmentPlan:
    """The plan; made elsewhere where this process would load torch for nothing else."""
    if options.backend != "serial" and "torch" not in sys.modules:
        return plan_apart(
            case, bundle, options, found=found, meanwhile=lambda: _import_for_tiles(options)
        )
    from workflows.planning import make_plan

    return make_plan(case, bundle, options, found=found)


def _import_for_tiles(options: SegmentOptions) -> None:
    """Import what the tiles need, which takes seconds, while another process plans them."""
    ray_address(options.ray_address)  # before Ray is imported
    importlib.import_module("pipeline.execution.ray_pool")
    uri = tracking_uri(options.tracking_uri, beside=Path())
    if uri != "none":
        import_for(uri)


def _run(
    product: Product, options: SegmentOptions, *, guard: Guard, stop: Callable[[], bool]
) -> dict[str, Any]:
    """Tiles, then the product, then the papers."""
    tracker = open_tracker(options, output=product.output, known=product.run.tracking)
    publisher = Publisher(product, tracker)
    try:
        return _tiles_and_papers(product, options, guard=guard, publisher=publisher, stop=stop)
    except BaseException:
        publisher.fail()
        raise


def _tiles_and_papers(
    product: Product,
    options: SegmentOptions,
    *,
    guard: Guard,
    publisher: Publisher,
    stop: Callable[[], bool],
) -> dict[str, Any]:
    plan, console = product.plan, stderr_console()
    image = ImageRun(product, options, guard=guard, publisher=publisher)
    publisher.start()  # now that the directory is known to be this run's, and its tracker's run too
    console.print(plan.summary)
    for note in plan.notes:
        log.warning("%s", note)
    progress = RunProgress(
        "tiles",
        total=len(plan.tiles) - len(plan.samples),
        done=len(image.known),
        file=product.run.progress,
        console=console,
    )
    image.watch(lambda record: progress.add(complaint=complaint(record)))
    feed = FairFeed()
    feed.add(image.tiles.jobs())
    feed.close()
    with closing(image), progress:
        if image.tiles.outcome.interrupted and not stop():
            backend = make_backend(
                options,
                device=plan.resolved.device,
                threads=plan.resolved.threads,
                workers=plan.workers,
                run_dir=product.run.path,
            )
            segment_images(
                feed,
                {product.case.name: image.tiles},
                backend=backend,
                ended=lambda _: None,
                stop=stop,
            )
    return image.finish()


def complaint(record: Record) -> str:
    """What to say of a tile that failed; nothing of others."""
    return f"tile {record.key.number} failed: {record.error}" if record.status == "failed" else ""
