"""Story 1 on arrays: the recipe of a model, and of the tiles of a case."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.memory import MemoryPieces, MemorySource, MemoryStore
from pipeline.domain import Grid, Halo, Pass, Region
from pipeline.errors import BundleError, PlanError
from pipeline.execution.worker import TileWorker
from pipeline.inference import precision as precision_module
from pipeline.inference.average import Average
from pipeline.inference.precision import Precision
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.models.receptive_field import reach_of
from pipeline.ports import Block, Job
from pipeline.segment_tile import SegmentModel, SegmentTiles, TileLogits
from pipeline.stitching.samples import SampleSink

FP32 = Precision(name="fp32", channels_last=True, why="")


class Owned:
    """A lease that is never lost."""

    def check(self) -> None:
        pass


@pytest.fixture(scope="module")
def bundle(slim: Path) -> Bundle:
    return load_bundle(slim)


@pytest.fixture
def model(bundle: Bundle) -> SegmentModel:
    return SegmentModel(
        bundle=bundle,
        device="cpu",
        precision=FP32,
        context="window",
        average=Average(own=reach_of(bundle.network())),
        threads=1,
        canonical_px=None,
        window=64,
        hosted=False,
    )


@pytest.fixture
def worker() -> Iterator[TileWorker]:
    with closing(TileWorker()) as worker:
        yield worker


def case_of(model: SegmentModel, *, seed: int = 0) -> tuple[SegmentTiles, Pass, MemoryStore]:
    """40 x 56 px in tiles of 32, with a hole that covers the last tile's core."""
    rng = np.random.default_rng(seed)
    image_CYX = rng.integers(1, 3000, (3, 40, 56), dtype=np.uint16)
    valid_YX = np.ones((40, 56), dtype=bool)
    valid_YX[32:, 32:] = False
    stride = model.bundle.architecture.output_stride
    grid = Grid(shape=(40, 56), tile=(32, 32), stride=stride)
    mask = MemoryStore((40, 56), dtype="uint8", fill=7)
    work = SegmentTiles(
        key=f"plan {seed}",
        model=model,
        source=MemorySource(image_CYX, valid_S=valid_YX),
        channels=(2, 1, 0),
        padded_shape=grid.padded_shape,
        scene=None,
        crf=None,
        area=None,
        mask=mask,
        scores=None,
        samples=SampleSink(MemoryPieces(), (Region((24, 24), (36, 40)),)),
        guard=Owned(),
    )
    sweep = Pass(
        case=str(seed),
        name="segment",
        grid=grid,
        reach=reach_of(model.bundle.network()),
        crf_halo=Halo.uniform(0, ndim=2),
    )
    return work, sweep, mask


def test_tiles_of_a_case_fill_its_mask(worker: TileWorker, model: SegmentModel) -> None:
    """Labels would be another network's, lie elsewhere, or stand where no pixel was valid."""
    work, sweep, mask = case_of(model)
    records = [worker.run(Job(work=work, tile=tile)) for tile in sweep.tiles()]
    assert [(r.status, r.error, r.skipped) for r in records] == [("done", "", False)] * 3 + [
        ("done", "", True)
    ]
    assert set(np.unique(mask.array)) <= {*model.bundle.class_values, 255}
    assert (mask.array[32:, 32:] == 255).all()
    assert (mask.array[:32, :32] != 255).all()
    assert sum(r.counts.get(255, 0) for r in records) == 8 * 24


def test_a_tile_keeps_its_logits_where_a_sample_meets_its_core(
    worker: TileWorker, model: SegmentModel
) -> None:
    """The certificate would compare another place, or what stands there after the CRF."""
    work, sweep, mask = case_of(model)
    for tile in sweep.tiles():
        worker.run(Job(work=work, tile=tile))
    sample = work.samples.regions[0]
    kept = {part.start: work.samples.store.read(part) for part in sweep.grid.parts(sample)}
    assert kept.pop((32, 32)) is None, "no pixel of that tile is valid"
    assert {start: piece.shape for start, piece in kept.items() if piece is not None} == {
        (24, 24): (4, 8, 8),
        (24, 32): (4, 8, 8),
        (32, 24): (4, 4, 8),
    }
    first = kept[24, 24]
    assert first is not None
    values = np.array(model.bundle.class_values)
    assert np.array_equal(values[first.argmax(axis=0)], mask.array[24:32, 24:32])


def test_bands_that_are_all_wanted_are_not_copied() -> None:
    """Reading a tile would take its pixels twice."""
    block = Block(np.arange(12).reshape(3, 2, 2), np.ones((2, 2), bool))
    assert block.bands((0, 1, 2)) is block
    assert np.array_equal(block.bands((2, 0)).image_CS, block.image_CS[[2, 0]])
    assert np.array_equal(block.bands((0, 1)).image_CS, block.image_CS[:2])


def test_cases_of_one_model_share_a_network_and_others_do_not(
    worker: TileWorker, model: SegmentModel
) -> None:
    """Every scan would load the network, or one be segmented with another's."""
    recipes = [model, pickle.loads(pickle.dumps(model)), replace(model, context="tile")]
    loads = []
    for seed, recipe in enumerate(recipes):
        work, sweep, _ = case_of(recipe, seed=seed)
        loads.append(worker.run(Job(work=work, tile=sweep.tile(0))).loads)
    assert loads == [1, 1, 2]


def test_the_key_of_a_model_is_all_that_decides_what_is_loaded(model: SegmentModel) -> None:
    """Two models of equal keys would be taken for one another."""
    others = [
        replace(model, bundle=replace(model.bundle, weights_sha256="0" * 64)),
        replace(model, device="cuda"),
        replace(model, precision=replace(FP32, name="bf16")),
        replace(model, precision=replace(FP32, channels_last=False)),
        replace(model, context="tile"),
        replace(model, threads=2),
    ]
    assert len({recipe.key for recipe in [model, *others]}) == len(others) + 1
    assert replace(model, precision=replace(FP32, why="asked")).key == model.key


def test_each_model_computes_with_its_own_threads(worker: TileWorker, model: SegmentModel) -> None:
    """Another number of threads gives other last bits: a retried tile would differ."""
    two = replace(model, threads=2)
    seen = []
    for seed, recipe in enumerate((model, two, model, two)):
        work, sweep, _ = case_of(recipe, seed=seed)
        assert worker.run(Job(work=work, tile=sweep.tile(0))).status == "done"
        asked = (lambda value: value, lambda _: torch.get_num_threads())
        seen.append(worker._line.put(*asked, asked[0], asked[0]).result()[0])
    assert seen == [1, 2, 1, 2]


def test_a_precision_that_this_machine_emulates_ends_the_run(
    worker: TileWorker, model: SegmentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one old node of a cluster every tile would take ten times as long, without a word."""
    monkeypatch.setattr(precision_module, "processor_flags", lambda: frozenset({"avx2"}))
    work, sweep, _ = case_of(replace(model, precision=replace(FP32, name="bf16")))
    with pytest.raises(PlanError, match="no native bfloat16"):
        worker.run(Job(work=work, tile=sweep.tile(0)))


def test_nan_of_the_network_fails_the_tile_where_a_pixel_is_valid() -> None:
    """The mask would say the first class, as if the network had."""
    logit_KS = np.ones((3, 4, 5), np.float32)
    logit_KS[1, 2, 3] = np.nan
    valid_S = np.ones((4, 5), bool)
    with pytest.raises(BundleError, match="NaN at 1 valid pixels"):
        TileLogits(valid_S=valid_S, wanted_S=valid_S, guide_CS=None, logit_KS=logit_KS)
    valid_S[2, 3] = False
    assert (
        TileLogits(valid_S=valid_S, wanted_S=valid_S, guide_CS=None, logit_KS=logit_KS).logit_KS
        is logit_KS
    )
