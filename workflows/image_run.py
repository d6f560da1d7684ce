"""One image on its way to its product: what is open while the lease is held."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from adapters.ledger_file import LedgerFile
from adapters.zarr_store import ZarrStore
from pipeline.errors import PlanError
from pipeline.ports import Guard, Record
from pipeline.segment_image import ImageTiles, Observer, Outcome
from pipeline.segment_tile import SegmentModel, SegmentTiles
from pipeline.stitching.scores import ScoreSink
from workflows.config import SegmentOptions
from workflows.finish import Product, lost_chunks, write_product
from workflows.manifest import manifest
from workflows.publish import Publisher
from workflows.run_dir import read_plan, write_json
from workflows.seam import SampleFiles, Seam, certify_work, lost_samples, seam_of

log = logging.getLogger(__name__)


class ImageRun:
    """Stores, ledger and tiles of one image, from a kept plan to a finished product."""

    def __init__(
        self,
        product: Product,
        options: SegmentOptions,
        *,
        guard: Guard,
        publisher: Publisher,
    ) -> None:
        """Raises PlanError for a directory of another run, StoreError for one that is damaged."""
        self.product, self.options, self.guard = product, options, guard
        self.run, self.plan, self._publisher = product.run, product.plan, publisher
        self._started = time.monotonic()
        self.run.sweep()
        self._keep_plan()
        self.mask = self._store(self.run.mask, dtype=product.bundle.mask_dtype)
        self._samples = SampleFiles.of(self.run)
        self._new: list[Record] = []
        self._ledger = LedgerFile(self.run.ledger, owner=f"pid{time.time_ns()}")
        self.known = self._trusted()
        self.run.manifest.unlink(missing_ok=True)  # its presence means that the product exists
        self.tiles = ImageTiles(
            self.plan.tiles,
            {
                self.plan.sweep.name: self._work(),
                self.plan.samples.name: certify_work(product, files=self._samples, guard=guard),
            },
            ledger=self._ledger,
            observers=[self._new.append],
        )
        self.watch(publisher.tile_done)

    def watch(self, observer: Observer) -> None:
        """Tell ``observer`` of every tile of the mask."""
        mask = self.plan.sweep.name
        self.tiles.observers.append(lambda r: observer(r) if r.key.stage == mask else None)

    @property
    def mask_outcome(self) -> Outcome:
        """How far the tiles of the mask are."""
        return self.tiles.outcome.of(self.plan.sweep)

    def finish(self) -> dict[str, Any]:
        """The product if its tiles allow it, then the papers; returns the manifest.

        Raises FinishError, StoreError, SourceError or LeaseHeldError.
        """
        outcome = self.tiles.outcome
        allowed = len(self.mask_outcome.failed) <= self.options.allow_failed
        seam = self._certified() if allowed and not outcome.interrupted else None
        if seam is not None:
            self.guard.check()
            write_product(self.product, store=self.mask, seam=seam.certificate)
            self.guard.check()
        values = manifest(
            self.product,
            outcome,
            seam=seam,
            new=self._new,
            seconds=time.monotonic() - self._started,
        )
        return self._publisher.finish(values, outcome=self.mask_outcome, store=self.mask, seam=seam)

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()

    def _certified(self) -> Seam:
        """The certificate, kept and, where it fails, told."""
        seam = seam_of(self.plan, files=self._samples, read_mask=self.mask.read)
        write_json(self.run.certificate, seam.as_json())
        if seam.complaint:
            log.warning("%s: %s", self.product.case.name, seam.complaint)
        return seam

    def _trusted(self) -> list[Record]:
        """Records of tiles that are done and whose chunk still holds what they say."""
        scores = self._scores()
        self.mask.sweep()
        found = [r for r in self._ledger.records().values() if r.status == "done"]
        done = [r for r in found if r.key.stage == self.plan.sweep.name]
        stores = [self.mask] if scores is None else [self.mask, scores.store]
        lost = {*lost_chunks(done, self.plan, stores)}
        lost |= {*lost_samples(found, self.plan, self._samples)}
        for key in lost:
            log.warning("%s %d: what it wrote is damaged; done again", key.stage, key.number)
            self._ledger.append(Record(key=key, status="failed", error="damaged"))
        if done:
            name, total = self.product.case.name, len(self.plan.sweep)
            log.warning("resuming %s: %d of %d tiles are done", name, len(done), total)
        return [record for record in done if record.key not in lost]

    def _keep_plan(self) -> None:
        """Write plan.json, or prove that the one that is there is this run's."""
        found = read_plan(self.run)
        if found is None:
            self.run.path.mkdir(parents=True, exist_ok=True)
            write_json(self.run.plan, self.plan.as_json())
        elif found["fingerprint"] != self.plan.tiles.fingerprint:
            raise PlanError(
                f"{self.run.path} holds another run (source, model, options or versions differ):"
                " choose another --run-dir, or add --fresh to start over"
            )

    def _store(self, path: Path, *, dtype: str) -> ZarrStore:
        grid = self.plan.sweep.grid
        fill = self.product.bundle.mask_nodata
        return ZarrStore.create(path, shape=grid.shape, chunks=grid.tile, dtype=dtype, fill=fill)

    def _scores(self) -> ScoreSink | None:
        dtype = self.options.scores
        if dtype == "none":
            return None
        grid, classes = self.plan.sweep.grid, len(self.product.bundle.classes)
        store = ZarrStore.create(
            self.run.scores,
            shape=(classes, *grid.shape),
            chunks=(classes, *grid.tile),
            dtype=dtype,
            fill=0,
        )
        return ScoreSink(store, dtype)

    def _work(self) -> SegmentTiles:
        plan, resolved = self.plan, self.plan.resolved
        return SegmentTiles(
            key=plan.tiles.fingerprint,
            model=SegmentModel(
                bundle=self.product.bundle,
                device=resolved.device,
                precision=resolved.precision,
                context=resolved.context,
                threads=resolved.threads,
            ),
            source=self.product.case.source,
            channels=plan.channels,
            padded_shape=plan.sweep.grid.padded_shape,
            crf=plan.crf,
            mask=self.mask,
            scores=self._scores(),
            samples=self._samples.sink(plan),
            guard=self.guard,
        )
