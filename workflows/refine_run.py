"""One image on its way through ``refine``: what is open while the lease is held."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapters.ledger_file import LedgerFile
from adapters.piece_files import PieceFiles
from adapters.zarr_store import ZarrStore
from pipeline.ports import Guard, Record, RowStore, Work
from pipeline.refine_scene import RefineScene
from pipeline.refine_tile import CrfModel, RefineSamples, RefineTiles
from pipeline.segment_image import ImageTiles
from pipeline.stitching.certificate import NO_PLACE, Disagreement
from workflows.config import RefineOptions
from workflows.finish import claim_output, lost_chunks
from workflows.lattice_rows import LatticeRows
from workflows.refine_plan import RefinePlan, Wish
from workflows.run_dir import RunDir, keep_plan, write_json

if TYPE_CHECKING:
    from adapters.nifti_header import VolumeSource

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineProduct:
    """What is to be written where, and from what."""

    wish: Wish
    plan: RefinePlan
    output: Path
    run: RunDir


class RefineRun:
    """Stores, ledger and tiles of one image, from a kept plan to a finished product."""

    def __init__(self, product: RefineProduct, options: RefineOptions, *, guard: Guard) -> None:
        """Raises PlanError for a directory of another run, StoreError for one that is damaged."""
        self.product, self.options, self.guard = product, options, guard
        self.run, self.plan = product.run, product.plan
        self.started = time.monotonic()
        self.run.sweep()
        keep_plan(self.run, self.plan.as_json(), of="source, scores, CRF, options or versions")
        grid, legend = self.plan.sweep.grid, self.plan.legend
        self.mask = ZarrStore.create(
            self.run.mask, shape=grid.shape, chunks=grid.tile, dtype=legend.dtype,
            fill=legend.nodata,
        )  # fmt: skip
        self._labels = PieceFiles(self.run.samples / "labels")
        self.new: list[Record] = []
        self._ledger = LedgerFile(self.run.ledger, owner=f"pid{time.time_ns()}")
        self.rows = None
        if self.plan.lattice is not None:
            self.rows = LatticeRows(self.run.lattice, self.plan.rounds, self.plan.scene)
        self._distrust()
        self.run.manifest.unlink(missing_ok=True)  # its presence means that the product exists
        self.tiles = ImageTiles(
            self.plan.tiles, self._works(), ledger=self._ledger, observers=[self.new.append]
        )
        if self.rows is not None:
            self.tiles.observers.append(self.rows.note)

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()

    def write(self, seam: Mapping[str, Any]) -> None:
        """Write, verify and name the output. Raises FinishError, StoreError or SourceError."""
        self.product.wish.check_unchanged(self.plan.scores_digest)
        self.guard.check()
        claim_output(self.run, self.product.output)
        self.run.scratch.mkdir(exist_ok=True)
        if self.product.wish.case.source.info.ndim == 2:
            self._write_raster(seam)
        else:
            self._write_volume()
        self.guard.check()

    def measure(self) -> dict[str, Any]:
        """How far tiles disagree with places that were computed with more context around them.

        The manifest's ``seam``; shares are None where nothing could be compared.
        """
        values: dict[str, Any] = {}
        for kind in ("seam", "interior"):
            found = self._disagreement(kind)
            values[kind] = {
                "pixels": found.of,
                "label_disagreement": found.share if found.of else None,
                "label_disagreement_upper_95": found.upper_95 if found.of else None,
            }
        seam = {
            **values["seam"],
            "interior": values["interior"],
            "exact": self.plan.one_piece,
            "reason": self._why_unmeasured(),
        }
        write_json(self.run.certificate, seam)
        return seam

    def _why_unmeasured(self) -> str | None:
        if self.rows is not None:
            return "one lattice under all tiles leaves no seam"
        if len(self.plan.sweep) == 1:
            return "the scene is one tile: there is no seam"
        return None if self.plan.samples.samples else NO_PLACE

    def _disagreement(self, kind: str) -> Disagreement:
        differ = pixels = 0
        for sample in self.plan.samples.samples:
            wanted_S = self._labels.read(sample.region) if sample.kind == kind else None
            if wanted_S is not None:
                valid_S = wanted_S != self.plan.legend.nodata
                differ += int((self.mask.read(sample.region) != wanted_S)[valid_S].sum())
                pixels += int(valid_S.sum())
        return Disagreement(differ, pixels, differ)

    def _distrust(self) -> None:
        """Have tiles done again whose chunk does not hold what the ledger says."""
        self.mask.sweep()
        done = [r for r in self._ledger.records().values() if r.status == "done"]
        tiles = [r for r in done if r.key.stage == self.plan.sweep.name]
        samples = [r for r in done if r.key.stage == self.plan.samples.name]
        lost = lost_chunks(tiles, self.plan.sweep, [self.mask])
        places = self.plan.samples.samples
        lost += [r.key for r in samples if self._labels.read(places[r.key.number].region) is None]
        lost += [] if self.rows is None else self.rows.lost(r for r in done if r.key not in lost)
        for key in lost:
            log.warning("%s %d: what it wrote is damaged; done again", key.stage, key.number)
            self._ledger.append(Record(key=key, status="failed", error="damaged"))
        if done:
            log.warning("resuming: %d of %d tiles are done", len(done), len(self.plan.tiles))

    def _works(self) -> dict[str, Work]:
        """What is done in each pass."""
        if self.rows is not None and self.plan.lattice is not None:
            return self._rounds(self.rows.store, self.plan.lattice.room_bytes)
        tiles, samples = self._each(), self.plan.samples
        key = f"{tiles.key} {samples.name}"
        again = RefineSamples(key=key, tiles=tiles, labels=self._labels)
        return {self.plan.sweep.name: tiles, samples.name: again}

    def _rounds(self, rows: RowStore, room_bytes: int) -> dict[str, Work]:
        """The tiles under one lattice, round by round."""
        work = RefineScene(
            tiles=self._each(),
            crf=self.plan.scene,
            rows=rows,
            turns=tuple(sweep.name for sweep in self.plan.rounds),
            room_bytes=room_bytes,
        )
        return dict.fromkeys(work.turns, work)

    def _each(self) -> RefineTiles:
        plan, wish = self.plan, self.product.wish
        return RefineTiles(
            key=plan.tiles.fingerprint,
            model=CrfModel(
                engine=plan.resolved.engine,
                device=plan.resolved.device,
                threads=plan.resolved.threads,
            ),
            source=wish.case.source,
            scores=wish.scores,
            crf=plan.crf,
            legend=plan.legend,
            mask=self.mask,
            guard=self.guard,
        )

    def _write_raster(self, seam: Mapping[str, Any]) -> None:
        from adapters.cog import CogSpec, write_cog

        plan, share = self.plan, seam["label_disagreement"]
        tags = {
            "TIFFTAG_SOFTWARE": f"terravox {plan.resolved.versions['terravox']}",
            "TERRAVOX_FINGERPRINT": plan.tiles.fingerprint,
            "TERRAVOX_SOURCE_DIGEST": plan.source_digest,
            "TERRAVOX_SCORES_DIGEST": plan.scores_digest,
            "TERRAVOX_TILE": " ".join(map(str, plan.sweep.grid.tile)),
            "TERRAVOX_CRF": f"{plan.resolved.engine}, {plan.crf.iterations} iterations",
            "TERRAVOX_CRF_SCOPE": plan.crf.scope,
        }
        if share is not None:
            tags["TERRAVOX_SEAM_LABEL_DISAGREEMENT"] = f"{share:.3g}"
        spec = CogSpec(
            source_path=self.product.wish.case.path,
            grid=plan.sweep.grid,
            dtype=plan.legend.dtype,
            classes=plan.legend.classes,
            tags=tags,
        )
        write_cog(self.product.output, store=self.mask, spec=spec, scratch=self.run.scratch)

    def _write_volume(self) -> None:
        from adapters.nifti_writer import Label, NiftiSpec, write_nifti

        plan = self.plan
        spec = NiftiSpec(
            dtype=plan.legend.dtype,
            nodata=plan.legend.nodata,
            labels=tuple(Label(c.id, c.name, c.color) for c in plan.legend.classes),
            intent_name="labels",
            description=f"terravox {plan.tiles.fingerprint[:16]} crf {plan.resolved.engine}",
            slab_voxels=max(plan.sweep.grid.tile),
        )
        source = cast("VolumeSource", self.product.wish.case.source)
        write_nifti(self.product.output, store=self.mask, grid=source.grid, spec=spec)
