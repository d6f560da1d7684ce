"""The seam certificate of a run: what is kept for it, how it is measured, what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.piece_files import PieceFiles
from pipeline.certify_sample import CertifySamples, ReferenceModel
from pipeline.domain import Region, TileKey
from pipeline.errors import StoreError
from pipeline.inference.scene_context import SceneSums
from pipeline.ports import Guard, PieceStore, Record
from pipeline.stitching.certificate import Certificate, Claim, Measured, certify
from pipeline.stitching.samples import SampleSink
from workflows.finish import Product
from workflows.run_dir import RunDir
from workflows.segment_plan import SegmentPlan


@dataclass(frozen=True, slots=True)
class SampleFiles:
    """Where a run keeps its samples."""

    tiles: PieceStore
    """Logits as the tiles have them, cut at their borders."""

    logits: PieceStore
    """Logits as the whole network has them."""

    labels: PieceStore
    """Labels as they should be."""

    @classmethod
    def of(cls, run: RunDir) -> SampleFiles:
        """Those of a run directory."""
        return cls(*(PieceFiles(run.samples / name) for name in ("tiles", "logits", "labels")))

    def sink(self, plan: SegmentPlan) -> SampleSink:
        """What tiles put their samples into."""
        return SampleSink(self.tiles, tuple(sample.region for sample in plan.samples.samples))


@dataclass(frozen=True, slots=True)
class Seam:
    """A certificate and the samples it rests on."""

    certificate: Certificate
    measured: Sequence[Measured]

    def as_json(self) -> dict[str, Any]:
        """What certificate.json holds: the manifest's ``seam``, and every sample."""
        rows = [
            asdict(one.sample.region)
            | {
                "kind": one.sample.kind,
                "pixels": int(one.compared.sum()),
                "max_abs_logit": float(one.delta.max()),
                "labels_differ": int(one.mask_differs.sum()),
            }
            for one in self.measured
        ]
        return {**self.certificate.as_json(), "samples": rows}

    @property
    def complaint(self) -> str:
        """What to warn of; empty unless the run does not keep what it claims."""
        if self.certificate.passed is not False:
            return ""
        return f"the seam certificate FAILED: {self.certificate.reason}"


def certify_work(
    product: Product, *, files: SampleFiles, sums: SceneSums | None, guard: Guard
) -> CertifySamples:
    """The recipe that computes the samples of a run again.

    ``sums``: of the run's context pass; None where it has none.
    """
    plan, resolved = product.plan, product.plan.resolved
    return CertifySamples(
        key=f"{plan.tiles.fingerprint} {plan.samples.name}",
        model=ReferenceModel(
            bundle=product.bundle,
            device=resolved.device,
            precision=resolved.precision,
            average=plan.average,
            threads=resolved.threads,
        ),
        source=product.case.source,
        channels=plan.channels,
        padded_shape=plan.sweep.grid.padded_shape,
        scene=sums,
        crf=plan.crf,
        area=product.case.area,
        logits=files.logits,
        labels=files.labels,
        guard=guard,
    )


def seam_of(
    product: Product, *, files: SampleFiles, read_mask: Callable[[Region], NDArray[Any]]
) -> Seam:
    """Compare what was kept of the tiles, and the mask, with what they should be.

    Under one lattice the network alone can leave a seam: labels by its logits stand for the mask's.

    Raises StoreError, and what ``read_mask`` raises.
    """
    plan, legend, measured = product.plan, product.bundle.legend, []
    values = np.array(legend.values)
    for sample in plan.samples.samples:
        region = sample.region
        reference_KS, wanted_S = files.logits.read(region), files.labels.read(region)
        if reference_KS is None or wanted_S is None:
            continue
        tiles_KS = np.full_like(reference_KS, np.nan)
        for part in plan.sweep.grid.parts(region):
            kept_KS = files.tiles.read(part)
            if kept_KS is not None:  # no number is as far off as can be, not absent
                index = (slice(None), *part.slices(within=region))
                tiles_KS[index] = np.nan_to_num(kept_KS, nan=float(np.finfo(np.float32).max))
        by_logits_S = np.where(wanted_S == legend.nodata, legend.nodata, values[tiles_KS.argmax(0)])
        mask_S = read_mask(region) if plan.scene is None else by_logits_S
        measured.append(
            Measured(
                sample=sample,
                reference_KS=reference_KS,
                tiles_KS=tiles_KS,
                wanted_S=wanted_S,
                mask_S=mask_S,
            )
        )
    claim = Claim(
        samples=len(plan.samples),
        one_tile=len(plan.sweep.grid) == 1,
        network_exact=plan.network_exact,
        precision=plan.resolved.precision.name,
        with_crf=plan.crf is not None,
    )
    return Seam(certify(measured, claim), measured)


def lost_samples(records: Iterable[Record], plan: SegmentPlan, files: SampleFiles) -> list[TileKey]:
    """Tiles and samples that the ledger calls done but whose samples are not there any more."""
    return [record.key for record in records if not _holds(record, plan, files)]


def _holds(record: Record, plan: SegmentPlan, files: SampleFiles) -> bool:
    number = record.key.number
    if record.key.stage == plan.samples.name:
        region = plan.samples.samples[number].region
        return _there(files.logits, [region]) and _there(files.labels, [region])
    if record.key.stage != plan.sweep.name:
        return True
    core = plan.sweep.grid.core(number)
    return record.skipped or _there(files.tiles, files.sink(plan).parts(core))


def _there(store: PieceStore, regions: Iterable[Region]) -> bool:
    try:
        return all(store.read(region) is not None for region in regions)
    except StoreError:
        return False
