"""What people see of a run: the tracker, the report, and last of all the manifest."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.mlflow_tracker import MlflowTracker, NoTracker
from pipeline.errors import StoreError
from pipeline.ports import ArrayStore, Record
from pipeline.segment_image import Outcome
from workflows.config import RunOptions, tracking_uri
from workflows.finish import Product
from workflows.quicklook import quicklook
from workflows.report import write_report
from workflows.run_dir import read_json, write_json
from workflows.seam import Seam
from workflows.seam_picture import seam_pictures

METRICS_EVERY_S = 5.0

SEAM_METRICS = ("max_abs_logit", "label_disagreement", "label_disagreement_upper_95")
"""Of the manifest's ``seam``."""


def open_tracker(options: RunOptions, *, output: Path, known: Path) -> MlflowTracker | NoTracker:
    """The tracker asked for; ``known`` holds the run that an interrupted command opened."""
    uri = tracking_uri(options.tracking_uri, beside=output.parent)
    if uri == "none":
        return NoTracker()
    run_id = (read_json(known) or {}).get("run_id")
    return MlflowTracker(uri, experiment=options.experiment, run_name=output.name, run_id=run_id)


class Publisher:
    """An observer of the run, and its closing: report, manifest, tracker."""

    def __init__(self, product: Product, tracker: MlflowTracker | NoTracker) -> None:
        self._product, self._tracker = product, tracker
        self._done = self._failed = self._pixels = 0
        self._start = self._logged = time.monotonic()

    def start(self) -> None:
        """Open the tracker's run, or go on in the one that an interrupted run opened."""
        plan, bundle = self._product.plan, self._product.bundle
        self._tracker.start(
            params=_flat(
                plan.as_json()["resolved"]
                | {"halo": plan.sweep.reach.halo.before, "aoi": plan.aoi or "none"}
            ),
            tags={
                "fingerprint": plan.tiles.fingerprint,
                "source": self._product.case.path.name,
                "source_digest": plan.source_digest,
                "model": f"{bundle.name} {bundle.version}",
                "model_digest": bundle.digest,
            },
        )
        if self._tracker.run_id:
            write_json(self._product.run.tracking, {"run_id": self._tracker.run_id})

    def tile_done(self, record: Record) -> None:
        """Figures over time, by tiles done; a few seconds' worth at once."""
        self._done += record.status == "done"
        self._failed += record.status == "failed"
        self._pixels += sum(record.counts.values())
        now = time.monotonic()
        if now - self._logged >= METRICS_EVERY_S:
            self._logged = now
            self._log(now)

    def fail(self) -> None:
        """Close the tracker's run as failed; the same command goes on in it."""
        self._tracker.finish("failed", artifacts=())

    def finish(
        self,
        manifest: Mapping[str, Any],
        *,
        outcome: Outcome,
        store: ArrayStore,
        seam: Seam | None,
    ) -> dict[str, Any]:
        """Report and tracker, then the manifest: only if the product exists. Returns it.

        ``outcome`` is of the mask's tiles; ``seam`` None where there is no product.
        """
        run, values = self._product.run, dict(manifest)
        self._log(time.monotonic())
        self._tracker.metrics(_final(values), step=self._done)
        values["mlflow_run_id"] = self._tracker.run_id
        artifacts = [run.plan]
        if seam is not None:
            artifacts += self._papers(values, outcome, store, seam)
        self._tracker.finish(values["status"], artifacts=artifacts)
        if self._tracker.error:
            values["notes"] = (*values["notes"], self._tracker.error)
        if values["output"]:
            write_json(run.manifest, values)
            shutil.rmtree(run.scratch, ignore_errors=True)
        return values

    def _papers(
        self, values: Mapping[str, Any], outcome: Outcome, store: ArrayStore, seam: Seam
    ) -> list[Path]:
        run, bundle = self._product.run, self._product.bundle
        colors, nodata = {look.id: look.color for look in bundle.classes}, bundle.mask_nodata
        case = self._product.case
        pictures = quicklook(case.source, store, colors=colors, nodata=nodata, area=case.area)
        seams = seam_pictures(seam.measured, colors=colors, nodata=nodata)
        overlay, records = run.scratch / "quicklook.png", list(outcome.records.values())
        try:
            write_report(
                run.report, manifest=values, pictures=pictures, seams=seams, records=records
            )
            run.scratch.mkdir(exist_ok=True)
            pictures["overlay"].save(overlay)
        except OSError as error:
            raise StoreError(
                f"{run.path}: the report could not be written: {error};"
                " free the disk and run the same command again"
            ) from error
        draft = run.scratch / run.manifest.name
        write_json(draft, values)
        return [draft, run.certificate, run.report, overlay]

    def _log(self, now: float) -> None:
        seconds = max(now - self._start, 1e-9)
        self._tracker.metrics(
            {
                "tiles_per_s": (self._done + self._failed) / seconds,
                "mpx_per_s": self._pixels / 1e6 / seconds,
                "tiles_failed": float(self._failed),
            },
            step=self._done,
        )


def _final(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Class areas or volumes, and the figures of the whole run."""
    values = {
        "seconds": float(manifest["seconds"]),
        "peak_memory_bytes": float(manifest["peak_memory_bytes"]),
        "halo_work_ratio": float(manifest["halo_work_ratio"]),
    }
    if "compute" in manifest["stages"]:
        values["device_busy_share"] = float(manifest["stages"]["compute"]["busy_share"])
    seam = manifest["seam"]
    for key in SEAM_METRICS if seam and seam["pixels"] else ():
        values[f"seam_{key}"] = float(seam[key])
    for row in manifest["classes"]:
        for key in ("pixels", "area_m2", "volume_ml"):
            if key in row:
                values[f"{key}/{row['name']}"] = float(row[key])
    return values


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
