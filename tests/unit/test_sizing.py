"""Which tile a plan takes, what it says of it, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
from command import Command
from scenes import fresh, texture, write_raster

from adapters.polygon_area import PolygonArea
from pipeline.crf.density import Density
from pipeline.crf.params import CrfParams
from pipeline.domain import Halo, ImageInfo, Walk
from pipeline.inference.precision import Precision
from pipeline.models.architecture import Architecture
from pipeline.models.bundle import load_bundle
from pipeline.models.deeplab import build_network
from pipeline.models.stages import stages_of
from workflows.config import SegmentOptions
from workflows.costs import DRIVER_BYTES, Budget, Team
from workflows.segmenting import plan
from workflows.sizing import Sizer
from workflows.tracing import of_layers, traced

FP32 = Precision(name="fp32", channels_last=True, why="")
PAIR = Team(workers=2, threads=1, device="cpu", alone=True)
CARD = replace(PAIR, device="cuda")
AMPLE = Budget(host=10**15, device=None)


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], slim: Path
) -> Command:
    return Command(monkeypatch, capsys, slim)


def raster(side: int) -> ImageInfo:
    return ImageInfo(
        shape=(side, side), axes=("y", "x"), channels=("1", "2", "3"), dtype="uint16",
        nodata=(0, 0, 0), spacing=(10.0, 10.0), unit="m",
    )  # fmt: skip


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory: pytest.TempPathFactory) -> Sizer:
    """As published, its weights not filled; over a scene of 65536 px a side."""
    architecture = Architecture(
        family="v3", backbone="resnet50", dims=2, output_stride=8, rates=(12, 24, 36),
        image_pooling=True,
    )  # fmt: skip
    with torch.device("meta"):
        network = build_network(architecture, bands=3, classes=4).eval().pool_over((512, 512))
    traced = of_layers(network, "window")
    bundle = fresh(tmp_path_factory.mktemp("bundle") / "slim")
    return Sizer(
        bundle=bundle,
        info=raster(65536),
        traced=traced,
        reach=traced.reach,
        whole=traced.reach,
        crf=None,
        density=None,
        canonical_px=None,
        window=64,
        hosted=False,
        scores=False,
        area=None,
        driver_bytes=DRIVER_BYTES,
    )


def test_the_receptive_field_is_that_of_the_literature(resnet50: Sizer) -> None:
    """The plan would state another network than torchvision's ResNet-50 (1019 px)."""
    assert resnet50.traced.receptive_field == (1019, 1019)


def test_a_deep_network_gets_large_tiles_and_a_tight_budget_smaller_ones(resnet50: Sizer) -> None:
    """Tiles of 512 px cost four times the work; tiles that do not fit kill the worker."""
    tiles = {
        gigabytes: resnet50.choose(
            None, PAIR, precision=FP32, budget=Budget(host=gigabytes * 10**9, device=None)
        ).tile[0]
        for gigabytes in (1, 6, 10, 200)
    }
    assert tiles[1] == 512
    assert tiles[1] < tiles[6] < tiles[10] == 4096 < tiles[200] == 8192


def test_the_memory_of_the_device_bounds_the_tile_as_well(resnet50: Sizer) -> None:
    """A card of 1.5 GB would be given a tile that takes more."""
    budget = Budget(host=10**15, device=15 * 10**8)
    choice = resnet50.choose(None, CARD, precision=FP32, budget=budget)
    assert choice.tile == (4096, 4096)
    takes = {
        side: resnet50.costs(resnet50.sweep((side, side), case=""), FP32).largest.device_bytes
        for side in (4096, 8192)
    }
    weights = 2 * resnet50.traced.weight_bytes
    assert takes[4096] + weights <= 15 * 10**8 < takes[8192] + weights


def test_a_large_card_gets_large_windows_and_a_small_one_smaller(resnet50: Sizer) -> None:
    """Between the launches of small windows a large card would be idle; a small one would fail."""
    windows = {
        gigabytes: resnet50.choose(
            4096, CARD, precision=FP32, budget=Budget(host=10**15, device=gigabytes * 10**9)
        ).window
        for gigabytes in (2, 3, 10, 80)
    }
    assert windows == {2: 64, 3: 128, 10: 256, 80: 512}


def test_maps_are_held_in_the_host_where_none_fit_on_the_card(resnet50: Sizer) -> None:
    """A card of less than a gigabyte would be refused, whatever the machine around it has; and
    where a tile fits on it whose halo is not four times the work, copies would take longer."""
    small = replace(resnet50, info=raster(4096), whole=resnet50.reach)
    found = {
        megabytes: small.choose(
            4096, CARD, precision=FP32, budget=Budget(host=10**15, device=megabytes * 10**6)
        )
        for megabytes in (600, 1500)
    }
    assert [found[size].hosted for size in (600, 1500)] == [True, False]
    costs = [
        replace(small, window=choice.window, hosted=choice.hosted).costs(
            small.sweep(choice.tile, case=""), FP32
        )
        for choice in found.values()
    ]
    assert costs[0].largest.device_bytes + small.traced.weight_bytes <= 600 * 10**6
    assert costs[0].largest.host_bytes > costs[1].largest.host_bytes + 400 * 10**6


def test_windows_are_made_smaller_rather_than_the_tile(resnet50: Sizer) -> None:
    """A scene that is one tile would be refused, or cut in four with half again as much work."""
    one = replace(resnet50, info=raster(4096), window=46)
    costs = one.costs(one.sweep((4096, 4096), case=""), FP32)
    peak = one.peak_bytes(costs, workers=1, device="cpu")
    found = [
        one.choose(None, PAIR, precision=FP32, budget=Budget(host=budget, device=None))
        for budget in (10**15, peak, peak - 1)
    ]
    assert {choice.tile for choice in found} == {(4096, 4096)}
    assert [choice.window for choice in found] == [46, 46, 32]


def test_deep_networks_take_smaller_windows_on_a_cpu(resnet50: Sizer, slim: Path) -> None:
    """A worker of ResNet-50 in fp32 took 0.3 GB more; the slim network would be slower."""
    known = traced(load_bundle(slim), "window")
    shallow = replace(resnet50, bundle=load_bundle(slim), traced=known, reach=known.reach)
    bf16 = Precision(name="bf16", channels_last=True, why="")
    found = [
        sizer.choose(4096, PAIR, precision=precision, budget=AMPLE).window
        for sizer, precision in ((resnet50, FP32), (resnet50, bf16), (shallow, FP32))
    ]
    assert found == [46, 64, 64]


def test_few_tiles_get_the_threads_of_the_workers_that_are_left_over(resnet50: Sizer) -> None:
    """A scene of one tile would leave every core but one idle."""
    small = replace(resnet50, info=raster(4096))
    alone = small.choose(None, PAIR, precision=FP32, budget=AMPLE)
    assert alone.tile == (4096, 4096)
    assert (alone.team.workers, alone.team.threads) == (1, 2)
    crowd = small.choose(None, replace(PAIR, alone=False), precision=FP32, budget=AMPLE)
    assert (crowd.team.workers, crowd.team.threads) == (2, 1)
    assert crowd.tile == (2048, 2048)


def test_canonical_windows_have_the_same_threads_for_any_tile(resnet50: Sizer) -> None:
    """Three threads round ResNet-50 in bf16 unlike one: the tile would decide the bytes."""
    small = replace(resnet50, info=raster(4096), canonical_px=256)
    threads = {
        side: small.choose(side, PAIR, precision=FP32, budget=AMPLE).team.threads
        for side in (512, 4096)
    }
    assert threads == {512: 1, 4096: 1}


def test_an_area_decides_the_tile_and_not_the_threads(resnet50: Sizer) -> None:
    """A field would get other bytes than with the scene around it, or a tile a hundred times it."""
    scene = replace(resnet50, info=raster(16384))
    field = PolygonArea((shapely.to_wkb(shapely.box(700, 700, 900, 900)),), (16384, 16384), "")
    part = replace(scene, area=field)
    asked = {"precision": FP32, "budget": AMPLE}
    alike = part.choose(4096, PAIR, **asked), scene.choose(4096, PAIR, **asked)
    assert len({(choice.tile, choice.window, choice.team) for choice in alike}) == 1
    assert part.choose(None, PAIR, **asked).tile < scene.choose(None, PAIR, **asked).tile
    sweep = part.sweep((512, 512), case="")
    costs = part.costs(sweep, FP32)
    assert costs.tiles == len(sweep) == 1
    assert costs.work < scene.costs(scene.sweep((512, 512), case=""), FP32).work / 900


def test_a_larger_tile_is_taken_where_the_smallest_does_not_fit(slim: Path) -> None:
    """Two workers on small tiles take more than one on the whole scene: a budget for one worker
    would be refused."""
    bundle = load_bundle(slim)
    known = traced(bundle, "window")
    small = Sizer(
        bundle=bundle,
        info=raster(1024),
        traced=known,
        reach=known.reach,
        whole=known.reach,
        crf=None,
        density=None,
        canonical_px=None,
        window=64,
        hosted=False,
        scores=False,
        area=None,
        driver_bytes=DRIVER_BYTES,
    )
    ample = small.choose(None, PAIR, precision=FP32, budget=AMPLE)
    assert (ample.tile, ample.team.workers) == ((512, 512), 2)
    costs = small.costs(small.sweep((1024, 1024), case=""), FP32)
    tight = Budget(host=small.peak_bytes(costs, workers=1, device="cpu"), device=None)
    choice = small.choose(None, PAIR, precision=FP32, budget=tight)
    assert (choice.tile, choice.team.workers) == ((1024, 1024), 1)


def test_two_passes_remember_what_the_wider_one_comes_back_to(resnet50: Sizer) -> None:
    """The reader of the second pass would forget its neighbours' blocks, and decode them again."""
    # The trunk alone reaches less than the logits.
    pooled = Halo.uniform(resnet50.reach.stride, ndim=2)
    reach = replace(resnet50.reach, window=None, pooled=pooled)
    scene = replace(resnet50, reach=reach, whole=reach)
    sweep = scene.sweep((2048, 2048), case="")
    before, _ = sweep.with_context()
    remembered = [Walk(each).remembered_pixels for each in (before, sweep)]
    assert remembered[0] < remembered[1]
    pixel_bytes = len(scene.info.channels) * 2
    assert scene.costs(sweep, FP32).cache_bytes == remembered[1] * pixel_bytes


def test_probabilities_that_are_written_are_counted(resnet50: Sizer) -> None:
    """A hundred classes in uint8 took 1.3 GB more than planned, and more in larger tiles."""
    kept = replace(resnet50, scores=True)
    sweep, classes = kept.sweep((2048, 2048), case=""), len(kept.bundle.classes)
    more, less = (s.costs(sweep, FP32).largest.host_bytes for s in (kept, resnet50))
    assert more - less == 5 * 2048**2 * classes * 4


def test_a_sample_may_be_the_most_that_a_crf_sees(slim: Path) -> None:
    """Two CRF halos around a sample are more than one around a small tile: memory would lack."""
    crf = CrfParams.from_mapping({"iterations": 1, "smoothness": {"weight": 3, "position": 200}})
    resolved = crf.resolve((1.0, 1.0), unit="px", channels=("1", "2", "3"))
    bundle = load_bundle(slim)
    known = traced(bundle, "window")
    sizer = Sizer(
        bundle=bundle,
        info=raster(8192),
        traced=known,
        reach=known.reach,
        whole=known.reach,
        crf=resolved,
        density=Density(runs=((0.1, 0.1),), places=1),
        canonical_px=None,
        window=64,
        hosted=False,
        scores=False,
        area=None,
        driver_bytes=DRIVER_BYTES,
    )
    sweep = sizer.sweep((512, 512), case="")
    samples = [tile.scored.size for tile in sizer.samples(sweep).tiles()]
    assert max(samples) > max(tile.scored.size for tile, _ in sweep.kinds())
    assert math.prod(sizer.costs(sweep, FP32).scored) == max(samples)


def test_the_threads_do_not_depend_on_the_workers_asked_for(tmp_path: Path) -> None:
    """Two commands that differ in --workers alone would give different bytes."""
    scene = write_raster(tmp_path / "s.tif", np.stack([texture((1100, 700), seed=1)] * 3))
    fresh(tmp_path / "slim")
    plans = [
        plan(scene, model=tmp_path / "slim", options=SegmentOptions(workers=count))
        for count in (1, 2, 5)
    ]
    assert len({plan["fingerprint"] for plan in plans}) == 1


def test_a_plan_over_the_budget_is_refused_with_what_it_takes(
    command: Command, scene: Path, slim: Path
) -> None:
    """A node would be lent less memory than the run needs, and kill it at night."""
    answer = command("plan", scene, "--model", slim, "--memory-budget", "1GB")
    answer.refuses("--memory-budget 1.0 GB", "the plan takes", "--workers")
    answer = command("plan", scene, "--model", slim, "--memory-budget", "64GB", "--json")
    assert answer.code == 0
    assert answer.manifest["peak_memory_bytes"] < 64e9
    command("plan", scene, "--model", slim, "--memory-budget", "much").refuses("--memory-budget")


def test_the_plan_says_what_a_user_wants_to_know(command: Command, scene: Path, slim: Path) -> None:
    """Halo, work, reading, memory, storage and time, before anything runs."""
    plan = command("plan", scene, "--model", slim, "--tile", "256", "--json").manifest
    bundle = load_bundle(slim)
    assert plan["receptive_field"] == [119, 119]
    assert 1.0 < plan["halo_work_ratio"] < plan["read_ratio"] < 2.3
    assert plan["store_bytes"] == 700 * 900
    assert plan["windows"]["kind"] == "rows"
    assert plan["stages"] == len(stages_of(bundle.network()).stages)
    assert 0 < plan["network_seconds"] < 300


MEASURE = """
import json, sys
from workflows.config import SegmentOptions
from workflows.segmenting import segment
scene, mask, model = sys.argv[1:]
fp32 = SegmentOptions(precision="fp32", crf="off", tile=1024)
asked = fp32.model_copy(update={"backend": "serial", "tracking_uri": "none"})
segment(scene, mask, model=model, options=asked)
plan = json.load(open(mask + ".run/plan.json"))
lines = open("/proc/self/status")
peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
print(json.dumps({"measured": peak, "predicted": plan["peak_memory_bytes"]}))
"""


def test_a_run_takes_no_more_memory_than_its_plan_said(tmp_path: Path) -> None:
    """Whoever sizes a node by the plan would see it killed, or pay twice for memory."""
    image = np.stack([texture((1500, 2100), seed=1)] * 3)
    scene = write_raster(tmp_path / "s.tif", image)
    fresh(tmp_path / "slim", classes=12)
    words = [str(scene), str(tmp_path / "mask.tif"), str(tmp_path / "slim")]
    call = [sys.executable, "-c", MEASURE, *words]
    out = subprocess.run(call, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    found = json.loads(out.splitlines()[-1])
    assert 0.4 * found["predicted"] < found["measured"] <= found["predicted"]
