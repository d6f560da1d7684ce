"""One lattice under the tiles of a network: what is kept until the rounds are over, and they."""

from __future__ import annotations

from dataclasses import replace

from adapters.zarr_store import ZarrStore
from pipeline.ports import ArrayStore, Guard, Work
from pipeline.refine_scene import RefineScene
from pipeline.refine_tile import CrfModel, RefineTiles
from pipeline.stitching.given_scores import StoredScores
from pipeline.stitching.scores import ScoreSink
from workflows.finish import Product
from workflows.lattice_rows import LatticeRows
from workflows.scene_plan import SCORES, ScenePlan


class SceneRun:
    """The network's scores and labels, and the rows of the rounds; deleted with the directory."""

    def __init__(self, product: Product, plan: ScenePlan) -> None:
        """Raises StoreError for a store that is damaged."""
        self._product, self._plan = product, plan
        run, grid, legend = product.run, plan.crf.grid, product.bundle.legend
        self.labels = ZarrStore.create(
            run.lattice / "network.zarr", shape=grid.shape, chunks=grid.tile, dtype=legend.dtype,
            fill=legend.nodata,
        )  # fmt: skip
        scores = ZarrStore.create(
            run.lattice / "scores.zarr", shape=(plan.classes, *grid.shape),
            chunks=(plan.classes, *grid.tile), dtype=SCORES, fill=0,
        )  # fmt: skip
        self.scores = ScoreSink(scores, SCORES)
        self.rows = LatticeRows(run.lattice / "rows", plan.rounds, plan.crf)
        for store in (self.labels, scores):
            store.sweep()

    @property
    def stores(self) -> list[ArrayStore]:
        """What the network's pass writes, as its records have their digests."""
        return [self.labels, self.scores.store]

    def works(self, mask: ArrayStore, *, guard: Guard) -> dict[str, Work]:
        """What is done in each round, by the name of its pass."""
        product, plan = self._product, self._plan
        image, legend = product.case.source, product.bundle.legend
        info = replace(
            image.info,
            channels=tuple(look.name for look in legend.classes),
            dtype=SCORES,
            nodata=(None,) * plan.classes,
            notes=(),
        )
        fingerprint, threads = product.plan.tiles.fingerprint, product.plan.resolved.threads
        tiles = RefineTiles(
            key=fingerprint,
            model=CrfModel(engine="native", device="cpu", threads=threads),
            source=image,
            scores=StoredScores(store=self.scores.store, info=info, name=fingerprint),
            crf=plan.crf.params,
            legend=legend,
            mask=mask,
            guard=guard,
        )
        work = RefineScene(
            tiles=tiles,
            crf=plan.crf,
            rows=self.rows.store,
            turns=tuple(sweep.name for sweep in plan.rounds),
            room_bytes=plan.lattice.room_bytes,
        )
        return dict.fromkeys(work.turns, work)
