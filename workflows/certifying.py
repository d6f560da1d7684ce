"""``certify``: the seam certificate of a finished run once more, from a fresh read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.lease_file import LeaseFile
from adapters.ledger_file import LedgerFile
from adapters.memory import MemoryPieces
from adapters.uri import open_source
from adapters.zarr_store import ZarrStore
from pipeline.errors import BundleError, ExecutionError, PlanError, SourceError, StoreError
from pipeline.execution.feed import FairFeed
from pipeline.execution.serial import SerialBackend
from pipeline.inference.scene_context import SceneSums
from pipeline.models.bundle import Bundle
from pipeline.ports import Guard, Job
from workflows.bundle_asked import bundle_asked
from workflows.case import Case
from workflows.config import SegmentOptions
from workflows.finish import Product
from workflows.interrupt import never
from workflows.planning import make_plan
from workflows.run_dir import RunDir, file_digest, read_json, read_plan, write_json
from workflows.seam import SampleFiles, certify_work, lost_samples, seam_of
from workflows.segment_plan import SegmentPlan


def certify(run_dir: str | Path, *, model: str | Path | None = None) -> dict[str, Any]:
    """Compute the samples of a finished run again, and compare them with it and its mask.

    Args:
        run_dir: ``OUT.run``, or ``DIR.run/cases/ID`` of a batch.
        model: the bundle, where it no longer lies where the run found it.

    Returns:
        What certificate.json holds, which is replaced; ``passed`` false where the run fails.

    Raises:
        PipelineError: no finished run, or its source, bundle, output or samples have changed.
    """
    run = RunDir(Path(run_dir).resolve())
    product = _product(run, model=model)
    with LeaseFile(run.path) as guard:
        try:
            return _certify(product, guard=guard)
        finally:
            shutil.rmtree(run.scratch, ignore_errors=True)  # what was unpacked of a volume


def _certify(product: Product, *, guard: Guard) -> dict[str, Any]:
    run, plan, kept = product.run, product.plan, SampleFiles.of(product.run)
    ledger, mask = LedgerFile(run.ledger, owner="certify").records(), plan.sweep.name
    tiles = [r for key, r in ledger.items() if key.stage == mask and r.status == "done"]
    lost = lost_samples(tiles, plan, kept)
    if lost:
        raise StoreError(
            f"{run.samples} no longer holds what tile {lost[0].number} said at the samples:"
            " nothing can be compared; run again with --fresh"
        )
    fresh = SampleFiles(tiles=kept.tiles, logits=MemoryPieces(), labels=MemoryPieces())
    sums = SceneSums(ZarrStore(run.sums), plan.sweep.grid) if plan.samples.needs else None
    work = certify_work(product, files=fresh, sums=sums, guard=guard)
    feed = FairFeed()
    feed.add([Job(work=work, tile=tile)] for tile in plan.samples.tiles())
    feed.close()
    for record in SerialBackend().run(feed, stop=never):
        if record.status == "failed":
            raise ExecutionError(f"sample {record.key.number} failed: {record.error}")
    output = open_source(str(product.output), scratch=run.scratch)
    seam = seam_of(product, files=fresh, read_mask=lambda region: output.read(region).image_CS[0])
    values = seam.as_json()
    write_json(run.certificate, values)
    return values


def _product(run: RunDir, *, model: str | Path | None) -> Product:
    """What the run made, if all that it was made from is still the same."""
    found, done = read_plan(run), read_json(run.manifest)
    if run.cases.is_dir():
        raise PlanError(f"{run.path} is a batch's: give {run.cases}/ID of one case")
    if found is None:
        raise PlanError(f"{run.path} holds no run: it has no plan.json; give an OUT.run")
    if "model" not in found["asked"]:
        raise PlanError(f"{run.path} is a refine run: what it measured is in its certificate.json")
    if done is None or not {"model", "output", "output_sha256"} <= done.keys():
        raise PlanError(f"{run.path} is not finished: run its command again first")
    bundle = _bundle(found["asked"], model, wanted=done["model"]["digest"])
    case = _case(found, run)
    output = Path(done["output"])
    if not output.is_file() or file_digest(output) != done["output_sha256"]:
        raise SourceError(
            f"{output} is gone, or is not what the run wrote: there is nothing to certify"
        )
    plan = _plan(case, bundle, found)
    return Product(case=case, bundle=bundle, plan=plan, output=output, run=run)


def _bundle(asked: Mapping[str, Any], given: str | Path | None, *, wanted: str) -> Bundle:
    recorded = asked["model"]
    if given is None and not Path(recorded).is_dir():
        raise BundleError(f"the bundle {recorded} is gone: say with --model where it is now")
    bundle = bundle_asked(given or recorded, SegmentOptions.model_validate(asked["options"]))
    if bundle.digest != wanted:
        raise BundleError(
            f"the bundle {bundle.path} has digest {bundle.digest[:12]}.., the run was made with"
            f" {wanted[:12]}..: give that one with --model"
        )
    return bundle


def _case(found: dict[str, Any], run: RunDir) -> Case:
    asked = found["asked"]
    path, volume, series = Path(asked["source"]), asked["volume"], asked["series"]
    source = open_source(str(path), volume=volume, series=series, scratch=run.scratch)
    digest = source.digest()
    if digest != found["source_digest"]:
        raise SourceError(f"{path} is not what the run read: its content has changed since")
    case = Case(
        name=found["case"], path=path, source=source, digest=digest, volume=volume, series=series
    )
    if asked.get("aoi") is None:
        return case
    case = case.within(Path(asked["aoi"]), scratch=run.scratch)
    if case.aoi is None or case.aoi.area.digest != found["aoi"]["digest"]:
        raise SourceError(f"{asked['aoi']} is not the area of the run: it has changed since")
    return case


def _plan(case: Case, bundle: Bundle, found: dict[str, Any]) -> SegmentPlan:
    """The run's plan, with the samples that it kept."""
    options = SegmentOptions.model_validate(found["asked"]["options"] | {"backend": "serial"})
    plan = make_plan(case, bundle, options, found=found)
    if plan.request_digest != found["request_digest"]:
        if options.crf in ("auto", "off"):
            raise PlanError(
                f"{case.name}: another version of terravox planned this run: certify it with that"
            )
        raise PlanError(f"{options.crf} is not the CRF that the run was made with: put it back")
    return plan
