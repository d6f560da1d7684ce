"""One image on its way to its product: what is open while the lease is held."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.ledger_file import LedgerFile
from adapters.zarr_store import ZarrStore
from pipeline.context_tile import ContextTiles
from pipeline.domain import Pass, TileKey
from pipeline.inference.scene_context import MISSING, SceneInOneTile, SceneSums, sums_layout
from pipeline.models.architecture import Architecture
from pipeline.ports import ArrayStore, Guard, Record, Source, Work
from pipeline.segment_image import ImageTiles, Observer, Outcome
from pipeline.segment_tile import SegmentModel, SegmentTiles
from pipeline.stitching.scores import ScoreSink
from workflows.config import SegmentOptions
from workflows.finish import Product, lost_chunks, write_product
from workflows.manifest import manifest
from workflows.publish import Publisher
from workflows.run_dir import keep_plan, write_json
from workflows.scene_run import SceneRun
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
        keep_plan(self.run, self.plan.as_json(), of="source, model, options or versions")
        self.mask = self._store(self.run.mask, dtype=product.bundle.mask_dtype)
        under_all = self.plan.scene
        self.scene = None if under_all is None else SceneRun(product, under_all)
        self._samples = SampleFiles.of(self.run)
        self.sums = self._scene_sums() if self.plan.samples.needs else None
        self._new: list[Record] = []
        self._ledger = LedgerFile(self.run.ledger, owner=f"pid{time.time_ns()}")
        self.known = self._trusted()
        self.run.manifest.unlink(missing_ok=True)  # its presence means that the product exists
        self.tiles = ImageTiles(
            self.plan.tiles,
            self._works(),
            ledger=self._ledger,
            observers=[self._new.append],
        )
        self.watch(publisher.tile_done)
        if self.scene is not None:
            self.tiles.observers.append(self.scene.rows.note)

    def watch(self, observer: Observer) -> None:
        """Tell ``observer`` of every tile that the mask needs: of all but the samples."""
        samples = self.plan.samples.name
        self.tiles.observers.append(lambda r: None if r.key.stage == samples else observer(r))

    @property
    def outcome(self) -> Outcome:
        """How far the tiles are that the mask needs."""
        return self.tiles.outcome.without(self.plan.samples)

    def finish(self) -> dict[str, Any]:
        """The product if its tiles allow it, then the papers; returns the manifest.

        Raises FinishError, StoreError, SourceError or LeaseHeldError.
        """
        failed = self.tiles.outcome.of(self.plan.last).failed
        allowed = len(failed) <= self.options.allow_failed
        seam = self._certified() if allowed and not self.tiles.outcome.interrupted else None
        if seam is not None:
            self.product.case.check_unchanged()
            self.guard.check()
            write_product(self.product, store=self.mask, seam=seam.certificate)
            self.guard.check()
        values = manifest(
            self.product,
            self.tiles.outcome,
            seam=seam,
            new=self._new,
            seconds=time.monotonic() - self._started,
        )
        if seam is not None and self.sums is not None:
            total_C = self.sums.total
            digest = hashlib.sha256(total_C.tobytes()).hexdigest()
            values["scene_mean"] = {"digest": digest, "features": int(total_C[-1])}
        answer = self._publisher.finish(values, outcome=self.outcome, store=self.mask, seam=seam)
        if seam is not None:
            shutil.rmtree(self.run.lattice, ignore_errors=True)
        return answer

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()

    def _certified(self) -> Seam:
        """The certificate, kept and, where it fails or lacks samples, told."""
        for record in self.tiles.outcome.of(self.plan.samples).failed:
            log.warning("sample %d failed: %s", record.key.number, record.error)
        seam = seam_of(self.product, files=self._samples, read_mask=self.mask.read)
        write_json(self.run.certificate, seam.as_json())
        if seam.complaint:
            log.warning("%s: %s", self.product.case.name, seam.complaint)
        return seam

    def _trusted(self) -> list[Record]:
        """Records of tiles that are done and whose chunk still holds what they say."""
        self.mask.sweep()
        found = [r for r in self._ledger.records().values() if r.status == "done"]
        lost = {*lost_samples(found, self.plan, self._samples)}
        scores = self._scores()
        written = [self.mask] if scores is None else [self.mask, scores.store]
        lost |= self._damaged(found, self.plan.last, written)
        if self.sums is not None:
            lost |= self._damaged(found, replace(self.plan.sweep, name="context"), [self.sums])
        if self.scene is not None:
            mask = [r for r in found if r.key.stage == self.plan.last.name and r.key not in lost]
            if len(mask) < len(self.plan.last):  # else what led to it is of no use any more
                lost |= self._damaged(found, self.plan.sweep, self.scene.stores)
            lost |= {*self.scene.rows.lost(r for r in found if r.key not in lost)}
        for key in lost:
            log.warning("%s %d: what it wrote is damaged; done again", key.stage, key.number)
            self._ledger.append(Record(key=key, status="failed", error="damaged"))
        done = [r for r in found if r.key.stage != self.plan.samples.name]
        if done:
            name, total = self.product.case.name, len(self.plan.tiles) - len(self.plan.samples)
            log.warning("resuming %s: %d of %d tiles are done", name, len(done), total)
        return [record for record in done if record.key not in lost]

    @staticmethod
    def _damaged(done: Iterable[Record], sweep: Pass, stores: Sequence[ArrayStore]) -> set[TileKey]:
        """Tiles of one pass whose chunks do not hold what their records say."""
        return {*lost_chunks((r for r in done if r.key.stage == sweep.name), sweep, stores)}

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

    def _source(self) -> Source:
        """The source for workers, who come back to what neighbouring tiles share."""
        from adapters.geotiff import GeoTiffSource

        source = self.product.case.source
        if isinstance(source, GeoTiffSource):
            return source.remembering(self.plan.costs.cache_bytes)
        return source

    def _scene_sums(self) -> SceneSums:
        from pipeline.models.deeplab import aspp_width

        grid, architecture = self.plan.sweep.grid, self.product.bundle.architecture
        assert isinstance(architecture, Architecture)
        shape, chunks = sums_layout(grid, aspp_width(architecture))
        store = ZarrStore.create(
            self.run.sums, shape=shape, chunks=chunks, dtype="float64", fill=MISSING
        )
        store.sweep()
        return SceneSums(store, grid)

    def _model(self) -> SegmentModel:
        resolved = self.plan.resolved
        return SegmentModel(
            bundle=self.product.bundle,
            device=resolved.device,
            precision=resolved.precision,
            context=resolved.context,
            average=self.plan.average,
            threads=resolved.threads,
            canonical_px=resolved.canonical_px,
            window=resolved.window,
            hosted=resolved.hosted,
        )

    def _works(self) -> dict[str, Work]:
        """What is done in each pass."""
        plan, grid, source, model = self.plan, self.plan.sweep.grid, self._source(), self._model()
        segment = SegmentTiles(
            key=plan.tiles.fingerprint,
            model=model,
            source=source,
            channels=plan.channels,
            padded_shape=grid.padded_shape,
            scene=None if plan.sweep.reach.pooled is None else self.sums or SceneInOneTile(grid),
            crf=plan.crf,
            area=self.product.case.area,
            mask=self.mask if self.scene is None else self.scene.labels,
            scores=self._scores() if self.scene is None else self.scene.scores,
            samples=self._samples.sink(plan),
            guard=self.guard,
        )
        certify = certify_work(self.product, files=self._samples, sums=self.sums, guard=self.guard)
        works: dict[str, Work] = {"segment": segment, plan.samples.name: certify}
        if self.scene is not None:
            works |= self.scene.works(self.mask, guard=self.guard)
        if self.sums is None:
            return works
        context = ContextTiles(
            key=f"{plan.tiles.fingerprint} context",
            model=model,
            source=source,
            channels=plan.channels,
            padded_shape=grid.padded_shape,
            sums=self.sums,
            guard=self.guard,
        )
        return {"context": context, **works}
