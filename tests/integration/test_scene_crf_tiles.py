"""One lattice under all tiles: where they are kept between rounds, and what if one fails."""

from __future__ import annotations

import json
import os
import signal
from itertools import count
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import rasterio
import yaml
from batches import OPTIONS, states, write_scene
from real_files import labels_of
from scenes import noisy, texture, write_raster

from adapters.ledger_file import LedgerFile
from pipeline.crf.engine import installed
from pipeline.domain import Tile
from pipeline.errors import SourceReadError
from pipeline.refine_tile import Given, RefineTiles
from workflows import lattice_size
from workflows.batching import batch
from workflows.config import RefineOptions
from workflows.refining import refine
from workflows.run_dir import file_digest
from workflows.segmenting import segment
from workflows.standing import status

if not installed("native"):
    pytest.skip("the native CRF engine was not built here", allow_module_level=True)

CRF = {
    "scope": "scene",
    "iterations": 4,
    "smoothness": {"weight": 3, "position": 3},
    "appearance": {
        "weight": 4, "position": 25, "value": 13, "bands": ["1", "2"], "range": [0, 2000],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that is larger than a tile, scores, and a CRF."""
    folder = tmp_path_factory.mktemp("scene")
    image_CYX = np.stack([texture((150, 190), seed=seed) for seed in (1, 2)])
    write_raster(folder / "image.tif", image_CYX)
    write_raster(folder / "scores.tif", noisy(image_CYX[0]), nodata=None)
    (folder / "crf.yaml").write_text(yaml.safe_dump({"crf": CRF}))
    return folder


def serial(made: Path, **more: object) -> dict[str, object]:
    """What ``refine`` takes beside image and mask."""
    options = RefineOptions(tile=64, tracking_uri="none", backend="serial", **more)
    return {"scores": made / "scores.tif", "crf": made / "crf.yaml", "options": options}


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Numbers of tiles that cannot be read; of nine, as long as they are in it."""
    numbers, read = {8}, RefineTiles.read

    def read_or_fail(self: RefineTiles, tile: Tile) -> Given:
        if tile.key.number in numbers:
            raise SourceReadError("the file ends early")
        return read(self, tile)

    monkeypatch.setattr(RefineTiles, "read", read_or_fail)
    return numbers


def test_a_tile_that_cannot_be_read_is_nodata_to_the_others(made, unreadable, tmp_path):
    """The rest would not be finished, or refined as if something were there."""
    refused = refine(made / "image.tif", tmp_path / "mask.tif", **serial(made))
    assert (refused["status"], refused["output"]) == ("partial", None)
    answer = refine(made / "image.tif", tmp_path / "mask.tif", **serial(made, allow_failed=1))
    assert (answer["status"], answer["tiles"]["failed"]) == ("partial", 1)
    assert "lattice-0 pass: tile 8" in answer["failed_tiles"][-1]["error"]
    unreadable.clear()
    with rasterio.open(made / "image.tif") as file:
        image_CYX = file.read()
    image_CYX[:, 128:, 128:] = 0
    holed = write_raster(tmp_path / "image.tif", image_CYX)
    wanted = refine(holed, tmp_path / "holed.tif", **serial(made))
    assert wanted["status"] == "done"
    np.testing.assert_array_equal(
        labels_of(tmp_path / "mask.tif"), labels_of(tmp_path / "holed.tif")
    )


@pytest.mark.parametrize("allowed", [0, 1])
def test_all_rounds_are_done_again_for_a_tile_that_can_be_read_again(
    made, unreadable, allowed, tmp_path
):
    """Its neighbours would stay as they were beside a hole."""
    output = tmp_path / "mask.tif"
    part = refine(made / "image.tif", output, **serial(made, allow_failed=allowed))
    assert (part["status"], part["output"] is None) == ("partial", not allowed)
    classed = sum(row["pixels"] for row in part["classes"])
    assert classed + part["nodata_pixels"] == np.prod(part["source"]["shape"])
    unreadable.clear()
    whole = refine(made / "image.tif", output, **serial(made, allow_failed=allowed))
    once = refine(made / "image.tif", tmp_path / "once.tif", **serial(made))
    assert (whole["status"], whole["output_sha256"]) == ("done", once["output_sha256"])


def test_a_tile_that_is_lost_in_a_later_round_ends_all_of_them(made, unreadable, tmp_path):
    """What it told before would be heard, and what it did not tell be taken for nothing."""
    unreadable.clear()
    asks = count()

    def stop() -> bool:
        if next(asks) == 12:
            unreadable.add(8)
        return False

    no_room = patch.object(lattice_size, "ROOM_BYTES", 0)  # else nothing is read in later rounds
    with no_room:
        lost = refine(
            made / "image.tif", tmp_path / "mask.tif", **serial(made, allow_failed=1), stop=stop
        )
    assert (lost["tiles"]["failed"], lost["output"]) == (9, None)
    unreadable.clear()
    with no_room:
        rest = refine(made / "image.tif", tmp_path / "mask.tif", **serial(made))
    once = refine(made / "image.tif", tmp_path / "once.tif", **serial(made))
    assert rest["output_sha256"] == once["output_sha256"]


def test_what_is_kept_between_rounds_does_not_show(made, tmp_path):
    """A tile that was left half-way, or heard its neighbours twice, would be another tile."""
    seen, kept = set(), []
    tile_bytes = 64 * 64 * 72
    for room in (0, 3 * tile_bytes, 2**30):
        output = tmp_path / f"{room}.tif"
        with patch.object(lattice_size, "ROOM_BYTES", room):
            answer = refine(made / "image.tif", output, **serial(made))
        seen.add(answer["output_sha256"])
        records = LedgerFile(Path(f"{output}.run/ledger"), owner="test").records()
        kept.append(sum(record.kept for record in records.values()))
        plan = json.loads(Path(f"{output}.run/plan.json").read_text())
        assert plan["lattice"]["room_bytes"] <= room
    assert len(seen) == 1
    assert kept[0] == 0 < kept[1] < kept[2] == 5 * 9


def test_each_tile_stays_with_the_actor_that_placed_it(made, tmp_path):
    """What one keeps would be placed anew by the other, in every round."""
    output = tmp_path / "mask.tif"
    options = RefineOptions(tile=64, tracking_uri="none", workers=2)
    asked = serial(made) | {"options": options}
    assert refine(made / "image.tif", output, **asked)["status"] == "done"
    records = LedgerFile(Path(f"{output}.run/ledger"), owner="test").records()
    homes: dict[int, set[str]] = {}
    for key, record in records.items():
        if key.stage != "segment":  # whose last tiles go to an actor that is idle
            homes.setdefault(key.number, set()).add(record.worker)
    assert [len(workers) for workers in homes.values()] == [1] * 9
    assert len(set().union(*homes.values())) == 2


def test_what_a_killed_actor_kept_is_placed_by_another(made, tmp_path):
    """Its tiles would wait for it for ever, or be left out of the sums."""
    output, killed = tmp_path / "mask.tif", set[int]()

    def kill_one() -> bool:
        records = LedgerFile(Path(f"{output}.run/ledger"), owner="test").records()
        kept = [r for key, r in records.items() if r.kept and key.stage == "lattice-1"]
        if kept and not killed:
            killed.add(int(kept[0].worker.rpartition(":")[2]))
            os.kill(*killed, signal.SIGKILL)
        return False

    options = RefineOptions(tile=64, tracking_uri="none", workers=2)
    asked = serial(made) | {"options": options}
    found = refine(made / "image.tif", output, **asked, stop=kill_one)
    once = refine(made / "image.tif", tmp_path / "once.tif", **serial(made))
    assert killed
    assert (found["status"], found["output_sha256"]) == ("done", once["output_sha256"])


def test_scenes_of_a_batch_get_what_each_gets_alone(slim, tmp_path):
    """Rounds of one scene would read what another one told, or find its tiles."""
    crf = CRF | {"appearance": CRF["appearance"] | {"bands": ["1", "2", "3"]}}
    (tmp_path / "crf.yaml").write_text(yaml.safe_dump(crf))
    options = OPTIONS.model_copy(update={"crf": str(tmp_path / "crf.yaml")})
    scenes = [write_scene(tmp_path / f"{seed}.tif", (90, 130), seed=seed) for seed in (1, 5)]
    for backend in ("serial", "ray"):
        asked = options.model_copy(update={"backend": backend, "workers": 2})
        result = batch(scenes, tmp_path / backend, models=[slim], options=asked)
        assert states(result) == {"1": "done", "5": "done"}
    for scene in scenes:
        alone = tmp_path / "alone" / scene.name
        alone.parent.mkdir(exist_ok=True)
        found = segment(scene, alone, model=slim, options=options)
        assert found["crf"]["lattice"]["sent_bytes"] > 0
        for backend in ("serial", "ray"):
            assert file_digest(tmp_path / backend / scene.name) == file_digest(alone)


def test_the_status_says_in_which_round_a_scene_is(made, tmp_path):
    """Nothing would seem to be done until the last round of an hour."""
    asks, run_dir = count(), tmp_path / "mask.tif.run"
    refine(made / "image.tif", tmp_path / "mask.tif", **serial(made), stop=lambda: next(asks) >= 22)
    found = status(run_dir)
    assert (found["state"], found["rounds_done"], found["rounds_total"]) == ("stopped", 2, 6)
    assert (found["tiles_done"], found["tiles_total"]) == (0, 9)
    refine(made / "image.tif", tmp_path / "mask.tif", **serial(made))
    found = status(run_dir)
    assert (found["state"], found["rounds_done"], found["tiles_done"]) == ("done", 6, 9)
