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
from pipeline.segment_image import ImageTiles
from pipeline.segment_tile import SegmentModel, SegmentTiles
from pipeline.stitching.scores import ScoreSink
from workflows.config import SegmentOptions
from workflows.finish import Product, lost_chunks, write_product
from workflows.manifest import manifest
from workflows.publish import Publisher
from workflows.run_dir import read_plan, write_json

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
        self._new: list[Record] = []
        self._ledger = LedgerFile(self.run.ledger, owner=f"pid{time.time_ns()}")
        self.known = self._trusted()
        self.run.manifest.unlink(missing_ok=True)  # its presence means that the product exists
        self.tiles = ImageTiles(
            self.plan.tiles,
            {self.plan.sweep.name: self._work()},
            ledger=self._ledger,
            observers=[self._new.append, publisher.tile_done],
        )

    def finish(self) -> dict[str, Any]:
        """The product if its tiles allow it, then the papers; returns the manifest.

        Raises FinishError, StoreError, SourceError or LeaseHeldError.
        """
        outcome = self.tiles.outcome
        allowed = len(outcome.failed) <= self.options.allow_failed
        written = allowed and not outcome.interrupted
        if written:
            self.guard.check()
            write_product(self.product, store=self.mask)
            self.guard.check()
        values = manifest(
            self.product,
            outcome,
            written=written,
            new=self._new,
            seconds=time.monotonic() - self._started,
        )
        return self._publisher.finish(values, outcome=outcome, store=self.mask)

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()

    def _trusted(self) -> list[Record]:
        """Records of tiles that are done and whose chunk still holds what they say."""
        scores = self._scores()
        self.mask.sweep()
        found, mask = self._ledger.records().values(), self.plan.sweep.name
        done = [r for r in found if r.status == "done" and r.key.stage == mask]
        stores = [self.mask] if scores is None else [self.mask, scores.store]
        lost = set(lost_chunks(done, self.plan, stores))
        for record in done:
            if record.key in lost:
                log.warning("tile %d: its chunk is damaged; done again", record.key.number)
                self._ledger.append(Record(key=record.key, status="failed", error="chunk damaged"))
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
            guard=self.guard,
        )
