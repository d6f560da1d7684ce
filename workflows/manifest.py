"""What a run did, as one object: ``manifest.json`` and the answer of ``--json``."""

from __future__ import annotations

import math
import os
import platform
import resource
import socket
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.domain import ImageInfo, Pass, Region
from pipeline.models.bundle import Bundle
from pipeline.models.input_spec import Legend
from pipeline.ports import Record
from pipeline.segment_image import Outcome
from workflows.finish import Product
from workflows.plan_json import halo_json, windows_json
from workflows.run_dir import file_digest
from workflows.seam import Seam
from workflows.segment_plan import SegmentPlan


def manifest(
    product: Product, outcome: Outcome, *, seam: Seam | None, new: Sequence[Record], seconds: float
) -> dict[str, Any]:
    """Keys as in the command's contract; ``seam`` is None while there is no product.

    So is ``scene_mean``, but where a context pass has taken one.

    ``seconds``, throughput, stages and memory are of this command, which did the ``new`` tiles.
    """
    plan, info, bundle = product.plan, product.case.source.info, product.bundle
    mask, needed = outcome.of(plan.last), outcome.without(plan.samples)
    return {
        "status": "interrupted" if outcome.interrupted else "partial" if needed.failed else "done",
        "output": str(product.output.resolve()) if seam else None,
        "output_sha256": file_digest(product.output) if seam else None,
        "fingerprint": plan.tiles.fingerprint,
        "request_digest": plan.request_digest,
        "source": {
            "uri": str(product.case.path.resolve()),
            "digest": plan.source_digest,
            "shape": info.shape,
            "crs": info.crs,
            "affine": info.affine,
            "selection": info.selection,
        },
        "model": {"name": bundle.name, "version": bundle.version, "digest": bundle.digest},
        "halo": halo_json(plan.sweep.reach) | {"exact": plan.network_exact},
        "tile": plan.sweep.grid.tile,
        "tiles": tile_counts(mask, outside=len(plan.last.grid) - len(plan.last)),
        "aoi": plan.aoi,
        "halo_work_ratio": round(plan.costs.halo_work_ratio, 4),
        "windows": windows_json(plan),
        "context": plan.resolved.context if _mixes(plan, bundle) else "none",
        "average": plan.resolved.average,
        "output_stride": plan.resolved.output_stride,
        "scene_mean": None,
        "crf": plan.scene.manifest(lattice(outcome)) if plan.scene else _crf(plan),
        "precision": plan.resolved.precision.name,
        "device": plan.resolved.device,
        "classes": classes(mask, info, bundle.legend),
        "nodata_pixels": nodata_pixels(mask, plan.last, nodata=bundle.mask_nodata),
        "seam": seam.certificate.as_json() if seam else None,
        "seconds": round(seconds, 3),
        "throughput": throughput(info, [r for r in new if r.key.stage == plan.last.name], seconds),
        "stages": stages(new),
        "peak_memory_bytes": peak_memory(new),
        "mlflow_run_id": None,
        "versions": all_versions(plan.resolved.versions),
        "notes": plan.notes + ((seam.complaint,) if seam and seam.complaint else ()),
        "failed_tiles": [
            {"pass": r.key.stage, "tile": r.key.number, "error": r.error, "deaths": r.deaths}
            for r in needed.failed
        ],
    }


def _mixes(plan: SegmentPlan, bundle: Bundle) -> bool:
    """Whether a label depends on more than the network's receptive field."""
    return bundle.architecture.pools or plan.receptive_field is None


def counts(outcome: Outcome) -> Counter[int]:
    """Pixels per mask value over all tiles done."""
    total: Counter[int] = Counter()
    for record in outcome.records.values():
        total.update(record.counts)
    return total


def classes(outcome: Outcome, info: ImageInfo, legend: Legend) -> list[dict[str, Any]]:
    """Pixels and area (m2) or volume (ml) of each class; no size where a pixel has none."""
    total = counts(outcome)
    size_key = {"m": "area_m2", "mm": "volume_ml", "px": None}[info.unit]
    rows = []
    for look in legend.classes:
        row: dict[str, Any] = {"id": look.id, "name": look.name, "color": look.color}
        row["pixels"] = total.get(look.id, 0)
        if size_key:
            size = row["pixels"] * info.voxel_size
            if info.graticule is not None:
                records = outcome.records.values()
                size = math.fsum(record.areas.get(look.id, 0) for record in records)
            row[size_key] = round(size, 6)
        rows.append(row)
    return rows


def tile_counts(outcome: Outcome, *, outside: int = 0) -> dict[str, int]:
    """How many tiles there are, and what became of them.

    Those ``outside`` of the area are done by being skipped.
    """
    done = [record for record in outcome.records.values() if record.status == "done"]
    return {
        "total": outcome.total + outside,
        "done": len(done) + outside,
        "failed": len(outcome.failed),
        "skipped": sum(record.skipped for record in done) + outside,
    }


def nodata_pixels(outcome: Outcome, sweep: Pass, *, nodata: int) -> int:
    """Pixels without a class: as counted in tiles, and those of tiles that failed or do not run."""
    outside = Region.whole(sweep.grid.shape).size - sweep.covered_pixels
    failed = sum(sweep.tile(record.key.number).core.size for record in outcome.failed)
    return counts(outcome).get(nodata, 0) + outside + failed


def _crf(plan: SegmentPlan) -> dict[str, Any] | None:
    if plan.crf is None:
        return None
    return {
        "engine": plan.crf.engine,
        "scope": "tile",
        "iterations": plan.crf.iterations,
        "halo": plan.sweep.crf_halo.before,
        "exact": len(plan.sweep.grid) == 1,
    }


def lattice(outcome: Outcome) -> dict[str, int] | None:
    """What became of the lattice under all tiles; None where each had its own."""
    records = [r for r in outcome.records.values() if r.vertices]
    if not records:
        return None
    first = [r for r in records if r.key.stage == records[0].key.stage]
    return {
        "vertices": sum(r.vertices for r in first),
        "sent_bytes": sum(r.sent_bytes for r in records),
    }


def throughput(info: ImageInfo, new: Sequence[Record], seconds: float) -> dict[str, float]:
    """Million pixels or voxels a second, of what this command did."""
    pixels = sum(sum(record.counts.values()) for record in new)
    unit = "mpx_per_s" if info.ndim == 2 else "mvox_per_s"
    return {unit: round(pixels / 1e6 / max(seconds, 1e-9), 4)}


def stages(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """What each stage of the workers did and waited for, in seconds, all workers summed.

    Per stage ``busy_s``, ``waited_s`` by what it waited for, and ``busy_share`` of both.
    """
    busy: Counter[str] = Counter()
    waited: dict[str, Counter[str]] = {}
    for record in records:
        busy.update(record.seconds)
        for stage, reasons in record.waits.items():
            waited.setdefault(stage, Counter()).update(reasons)
    return {
        stage: {
            "busy_s": round(seconds, 3),
            "waited_s": {reason: round(s, 3) for reason, s in sorted(reasons.items())},
            "busy_share": round(seconds / max(seconds + sum(reasons.values()), 1e-9), 4),
        }
        for stage, seconds in busy.items()
        for reasons in [waited.get(stage, Counter())]
    }


def all_versions(planned: Mapping[str, str]) -> Mapping[str, str]:
    """Those that decide the bytes, and those of the other libraries."""
    names = ("ray", "rasterio", "nibabel", "pydicom", "simpleitk", "zarr", "mlflow")
    more = {name: version(name) for name in names}
    return {"python": platform.python_version(), **planned, **more}


def peak_memory(records: Iterable[Record]) -> int:
    """Peak resident bytes: this process, and the greatest that each other worker reported."""
    peaks = {f"{socket.gethostname()}:{os.getpid()}": 0}
    for record in records:
        peaks[record.worker] = max(peaks.get(record.worker, 0), record.peak_bytes)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peaks[f"{socket.gethostname()}:{os.getpid()}"] = own
    return sum(peaks.values())


def default_run_dir(output: Path) -> Path:
    """``OUT.run`` beside the output."""
    return output.with_name(f"{output.name}.run")
