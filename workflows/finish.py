"""From a complete store to the product: stream, reopen, compare, rename."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapters.uri import output_kind
from pipeline.domain import ImageInfo, Pass, TileKey
from pipeline.errors import FinishError, PlanError, SourceError, StoreError
from pipeline.models.bundle import Bundle
from pipeline.ports import ArrayStore, Record
from pipeline.stitching.certificate import Certificate
from workflows.case import Case
from workflows.plan_json import windows_json
from workflows.run_dir import RunDir, file_digest, read_json, write_json
from workflows.segment_plan import SegmentPlan

if TYPE_CHECKING:
    from adapters.nifti_header import VolumeSource


SEAM_TAGS = (
    "windows",
    "pixels",
    "max_abs_logit",
    "label_disagreement",
    "label_disagreement_upper_95",
    "label_disagreement_before_crf",
    "exact",
    "passed",
)
"""Keys of the manifest's ``seam`` that the file carries as tags."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What is to be written where, and from what."""

    case: Case
    bundle: Bundle
    plan: SegmentPlan
    output: Path
    run: RunDir


def check_output(output: Path, *, source: Path, info: ImageInfo, run: RunDir) -> None:
    """Refuse what cannot be written, or would destroy something, in the end. Raises SourceError."""
    wanted = "cog" if info.ndim == 2 else "nifti"
    if output_kind(str(output)) != wanted:
        suffix = {"cog": ".tif", "nifti": ".nii or .nii.gz"}[wanted]
        raise SourceError(f"output {output}: a source of {info.ndim} axes is written as {suffix}")
    if not output.parent.is_dir():
        raise SourceError(f"output {output}: the directory {output.parent} does not exist")
    if output.is_dir():
        raise SourceError(f"output {output} is a directory; give the path of a file")
    if output.exists() and output.samefile(source):
        raise SourceError(f"output {output} is the source itself; choose another output")
    if output.resolve() == run.path:
        raise SourceError(f"output {output} is the run directory as well; choose another --run-dir")
    inside = [part for part in run.parts if part in output.resolve().parents]
    if inside:
        raise SourceError(f"output {output} lies in {inside[0]}, the run's own; choose another")
    hiding = output.with_name(f"{output.name}.msk")
    if info.ndim == 2 and hiding.exists():
        raise SourceError(f"output {output}: readers would hide what {hiding} masks; move it away")
    if not os.access(output.parent, os.W_OK):
        raise SourceError(f"output {output}: the directory {output.parent} cannot be written to")


def write_product(product: Product, *, store: ArrayStore, seam: Certificate) -> None:
    """Write, verify and name the output. Raises FinishError, StoreError or SourceError."""
    claim_output(product.run, product.output)
    product.run.scratch.mkdir(exist_ok=True)
    if product.case.source.info.ndim == 2:
        _write_raster(product, store, seam)
    else:
        _write_volume(product, store, seam)


def claim_output(run: RunDir, output: Path) -> None:
    """Mark it as ours. Raises FinishError for a file that has appeared there during the run."""
    mark = read_json(finishing_mark(run)) or {}
    if output.exists() and mark.get("output") != str(output.resolve()):
        raise FinishError(
            f"{output} has appeared while this ran, and somebody else made it: move it away and"
            " run the same command again"
        )
    mark_output(run, output)


def mark_output(run: RunDir, output: Path) -> None:
    """Note that this run may give the output its name: a rerun after a kill must know."""
    write_json(finishing_mark(run), {"output": str(output.resolve())})


def finished(
    run: RunDir, output: Path, *, fingerprint: str, known: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The manifest of this very run; None when this run directory has yet to finish it.

    ``known`` is its plan.json. Raises PlanError for an output that something else wrote.
    """
    # Not the request: 8 GB asked and 16 GB asked may be one run.
    if known is not None and known["fingerprint"] == fingerprint:
        done, mark = read_json(run.manifest), read_json(finishing_mark(run))
        here = str(output.resolve())
        if done is not None and done.get("output") == here:
            if done.get("output_sha256") == file_digest(output):
                return done if done["status"] == "done" else None
        elif done is None and mark is not None and mark.get("output") == here:
            return None
    raise PlanError(
        f"{output} exists and was not made by this command"
        f" ({'source, model, options, versions or its bytes' if known else 'no run directory'}"
        f"{' differ' if known else ' beside it'}):"
        " choose another output, or add --fresh to replace it"
    )


def finishing_mark(run: RunDir) -> Path:
    """Present once this run may have given the output its name."""
    return run.path / "finishing.json"


def _write_raster(product: Product, store: ArrayStore, seam: Certificate) -> None:
    from adapters.cog import CogSpec, write_cog

    bundle, plan = product.bundle, product.plan
    spec = CogSpec(
        source_path=product.case.path,
        grid=plan.sweep.grid,
        dtype=bundle.mask_dtype,
        classes=bundle.classes,
        tags={
            "TIFFTAG_SOFTWARE": f"terravox {plan.resolved.versions['terravox']}",
            "TERRAVOX_FINGERPRINT": plan.tiles.fingerprint,
            "TERRAVOX_MODEL": f"{bundle.name} {bundle.version}",
            "TERRAVOX_MODEL_DIGEST": bundle.digest,
            "TERRAVOX_SOURCE_DIGEST": plan.source_digest,
            "TERRAVOX_HALO": " ".join(map(str, plan.sweep.reach.halo.before)),
            "TERRAVOX_TILE": " ".join(map(str, plan.sweep.grid.tile)),
            "TERRAVOX_WINDOWS": windows_json(plan)["kind"],
            "TERRAVOX_AVERAGE": plan.resolved.average,
            "TERRAVOX_OUTPUT_STRIDE": str(plan.resolved.output_stride),
            "TERRAVOX_PRECISION": plan.resolved.precision.name,
            "TERRAVOX_CRF": "on" if plan.crf or plan.scene else "off",
            "TERRAVOX_AOI_DIGEST": plan.aoi["digest"] if plan.aoi else "none",
            **_seam_tags(seam),
        },
    )
    write_cog(product.output, store=store, spec=spec, scratch=product.run.scratch)


def _write_volume(product: Product, store: ArrayStore, seam: Certificate) -> None:
    from adapters.nifti_writer import Label, NiftiSpec, write_nifti

    bundle, plan = product.bundle, product.plan
    spec = NiftiSpec(
        dtype=bundle.mask_dtype,
        nodata=bundle.mask_nodata,
        labels=tuple(Label(c.id, c.name, c.color) for c in bundle.classes),
        intent_name="labels",
        description=(
            f"terravox {plan.tiles.fingerprint[:16]} model {bundle.digest[:16]}{_seam_text(seam)}"
        ),
        slab_voxels=max(plan.sweep.grid.tile),
    )
    source = cast("VolumeSource", product.case.source)
    write_nifti(product.output, store=store, grid=source.grid, spec=spec)


def _seam_tags(seam: Certificate) -> dict[str, str]:
    """The figures astride tile borders, and the verdict; what nobody measured is left out."""
    values = {key: value for key, value in seam.as_json().items() if key in SEAM_TAGS}
    return {
        f"TERRAVOX_SEAM_{key.upper()}": f"{value:.3g}"
        if isinstance(value, float)
        else str(value).lower()
        for key, value in values.items()
        if value is not None
    }


def _seam_text(seam: Certificate) -> str:
    """The little that fits into a NIfTI header; empty where nothing was measured."""
    figures = seam.seam
    if not figures.pixels:
        return ""
    return f" seam {figures.max_abs_logit:.1e} {figures.mask.differ}/{figures.pixels}"


def lost_chunks(
    records: Iterable[Record], sweep: Pass, stores: Sequence[ArrayStore]
) -> list[TileKey]:
    """Tiles that the ledger calls done but whose chunks do not hold those bytes any more.

    ``stores``: the mask, and the scores when they were asked for.

    A power loss can take a chunk that a killed process could not: read back before it is trusted.
    """
    return [record.key for record in records if not _holds(record, sweep, stores)]


def _holds(record: Record, sweep: Pass, stores: Sequence[ArrayStore]) -> bool:
    core = sweep.tile(record.key.number).core
    try:
        found = [hashlib.sha256(store.read(core).tobytes()).hexdigest() for store in stores]
    except StoreError:
        return False
    return found == [record.digest, record.scores_digest][: len(stores)]
