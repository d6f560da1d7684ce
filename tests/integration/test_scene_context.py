"""``--context scene``: two passes through the whole command."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import texture, write_raster
from torch import Tensor, nn

from adapters.ledger_file import LedgerFile
from adapters.uri import open_source
from adapters.zarr_store import ZarrStore
from pipeline.context_tile import ContextTiles
from pipeline.domain import Grid, Region
from pipeline.inference.normalise import normalise
from pipeline.inference.padding import read_padded
from pipeline.inference.stage_plan import needs_of, stage_work
from pipeline.models.bundle import Architecture, Bundle, load_bundle
from pipeline.models.chain import Chain
from pipeline.models.frame import Frame
from pipeline.models.fresh import new_bundle
from pipeline.models.scene_mean import valid_features
from pipeline.models.scene_stages import pooled_chain
from workflows.batching import batch
from workflows.config import SegmentOptions
from workflows.run_dir import file_digest
from workflows.segmenting import plan, segment
from workflows.tracing import traced

TIE = 1e-3  # of the logits' deviation
TILE, TILES = 128, 4 * 6


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 x 740 px, bright to the right, with a nodata corner."""
    image = np.stack([texture((500, 740), seed=seed) for seed in (1, 2, 3)])
    image = (image * np.linspace(0.5, 1.5, 740)).astype(np.uint16)
    image[:, :300, :150] = 0
    return write_raster(tmp_path_factory.mktemp("scene") / "scene.tif", image)


def pooled(folder: Path, *, dims: int, bands: int, stride: int) -> Path:
    architecture = Architecture(
        family="v3",
        backbone="slim",
        dims=dims,
        output_stride=stride,
        rates=(1, 2),
        image_pooling=True,
    )
    return new_bundle(folder, architecture=architecture, bands=bands, classes=4, seed=3).path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pooled(tmp_path_factory.mktemp("bundles") / "pooled", dims=2, bands=3, stride=8)


@pytest.fixture(scope="module")
def model3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pooled(tmp_path_factory.mktemp("bundles") / "pooled3d", dims=3, bands=1, stride=4)


def options(**changes: object) -> SegmentOptions:
    asked: dict[str, object] = {
        "backend": "serial", "tracking_uri": "none", "precision": "fp32", "crf": "off",
        "tile": TILE, "context": "scene",
    }  # fmt: skip
    return SegmentOptions(**(asked | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def wanted(scene: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of an undisturbed serial run."""
    output = tmp_path_factory.mktemp("whole") / "whole.tif"
    segment(scene, output, model=model, options=options())
    return file_digest(output)


class MaskedMean(nn.Module):
    """The oracle's pooling: one plain mean over the features that count."""

    def __init__(self, counts_S: np.ndarray) -> None:
        super().__init__()
        self.counts_S = torch.from_numpy(counts_S)

    def forward(self, features_BCS: Tensor, frame: Frame) -> Tensor:
        mean_BC: Tensor = features_BCS[:, :, self.counts_S].mean(dim=2)
        return mean_BC.reshape(*mean_BC.shape, *(1,) * (features_BCS.ndim - 2))


def whole_pass(source_path: Path, bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
    """(K, *S) logits of one plain forward over the whole padded scene, and what is valid."""
    source, stride = open_source(str(source_path)), bundle.architecture.output_stride
    shape = source.info.shape
    padded = Grid(shape=shape, tile=(stride,) * len(shape), stride=stride).padded_shape
    block = read_padded(source, Region.whole(padded))
    network = bundle.network()
    assert network.pool is not None
    inside = tuple(slice(0, n) for n in shape)
    network.pool[0] = MaskedMean(valid_features(block.valid_S[inside], stride=stride))
    image_BCS = torch.from_numpy(normalise(block, bundle.input.scaling)).unsqueeze(0)
    with torch.inference_mode():
        logits_KS = network(image_BCS, Frame((0,) * len(shape), padded))[0].numpy()
    return logits_KS[(slice(None), *inside)], block.valid_S[inside]


def wrong(output: Path, logits_KS: np.ndarray, valid_S: np.ndarray) -> int:
    """Labels that are not the whole pass's, near ties left out."""
    labels_S = ZarrStore(Path(f"{output}.run/mask.zarr")).read(Region.whole(logits_KS.shape[1:]))
    best = np.sort(logits_KS, axis=0)
    tie_S = best[-1] - best[-2] <= TIE * logits_KS.std()
    return int(((labels_S != logits_KS.argmax(axis=0)) & valid_S & ~tie_S).sum())


def stages(output: Path) -> list[str]:
    """The pass of each line of the ledger that the mask needs: samples come when they like."""
    history = LedgerFile(Path(f"{output}.run/ledger"), owner="test").history()
    return [record.key.stage for record in history if record.key.stage != "certify"]


def test_a_raster_in_two_passes_equals_one_pass_over_the_scene(
    scene: Path, model: Path, tmp_path: Path
) -> None:
    """The mean of a part, of nodata, or of padding would bend labels everywhere."""
    oracle = whole_pass(scene, load_bundle(model))
    found = {}
    for tile in (128, 256, 1024):
        output = tmp_path / f"{tile}.tif"
        manifest = segment(scene, output, model=model, options=options(tile=tile))
        assert manifest["halo"]["exact"]
        assert manifest["context"] == "scene"
        assert wrong(output, *oracle) == 0
        found[tile] = manifest["scene_mean"] and manifest["scene_mean"]["features"]
    assert found == {128: found[128], 256: found[128], 1024: None}
    other = tmp_path / "tile.tif"
    segment(scene, other, model=model, options=options(context="tile"))
    assert wrong(other, *oracle) > 1000, "any mean would have done"


def test_a_volume_in_two_passes_equals_one_pass_over_the_scan(
    volume: Path, model3d: Path, tmp_path: Path
) -> None:
    """The same in three dimensions, for tiles that are made of whole blocks and those that not."""
    oracle = whole_pass(volume, load_bundle(model3d))
    for tile in (32, 40):
        output = tmp_path / f"{tile}.nii.gz"
        segment(volume, output, model=model3d, options=options(tile=tile))
        assert wrong(output, *oracle) == 0


def test_canonical_windows_give_the_same_bytes_and_mean_for_any_tile(
    scene: Path, model: Path, tmp_path: Path
) -> None:
    """One pass over a small scene would give other last bits than two over its tiles."""
    masks, means = [], set()
    for tile in (256, 512, 1024):
        output = tmp_path / f"{tile}.tif"
        asked = options(tile=tile, windows="canonical")
        manifest = segment(scene, output, model=model, options=asked)
        masks.append(ZarrStore(Path(f"{output}.run/mask.zarr")).read(Region.whole((500, 740))))
        means.add(manifest["scene_mean"] and manifest["scene_mean"]["digest"])
    assert all(np.array_equal(mask, masks[0]) for mask in masks)
    assert len(means - {None}) == 1


def test_actors_give_the_same_file_and_the_same_mean(
    scene: Path, model: Path, tmp_path: Path, cluster: None, wanted: str
) -> None:
    """The order in which tiles end would move the mean."""
    means = set()
    for workers in (1, 2):
        output = tmp_path / f"{workers}.tif"
        asked = options(backend="ray", workers=workers)
        manifest = segment(scene, output, model=model, options=asked)
        assert file_digest(output) == wanted
        assert stages(output) == ["context"] * TILES + ["segment"] * TILES
        means.add(manifest["scene_mean"]["digest"])
    assert len(means) == 1


@pytest.mark.chaos
def test_a_run_killed_in_either_pass_is_finished_by_the_same_command(
    scene: Path, model: Path, tmp_path: Path, wanted: str
) -> None:
    """A first pass that is half done would be begun anew, or taken for whole."""
    output = tmp_path / "killed.tif"
    line = [
        str(Path(sys.executable).with_name("terravox")), "segment", str(scene), "-o", str(output),
        "--model", str(model), "--tile", str(TILE), "--precision", "fp32", "--crf", "off",
        "--backend", "serial", "--tracking-uri", "none", "--context", "scene",
    ]  # fmt: skip
    for enough in (3, TILES + 3):
        process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(stages(output)) < enough:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not output.exists()
    segment(scene, output, model=model, options=options())
    assert file_digest(output) == wanted
    assert stages(output) == ["context"] * TILES + ["segment"] * TILES


def test_sums_that_were_lost_are_made_again(
    scene: Path, model: Path, tmp_path: Path, wanted: str
) -> None:
    """A mean would be taken over what a power loss left."""
    output = tmp_path / "o.tif"

    def stop() -> bool:
        return len(stages(output)) >= TILES

    assert segment(scene, output, model=model, options=options(), stop=stop)["output"] is None
    sums = Path(f"{output}.run/context.zarr")
    chunks = sorted(path for path in sums.rglob("*") if path.is_file() and path.name != "zarr.json")
    chunks[0].unlink()
    chunks[-1].write_bytes(chunks[-1].read_bytes()[:-7])
    segment(scene, output, model=model, options=options())
    assert file_digest(output) == wanted
    kept = stages(output)
    assert kept.count("context") == TILES + 2 + 2  # each with a line that says it was lost


def test_a_first_pass_that_fails_is_told_and_done_again(
    scene: Path, model: Path, tmp_path: Path, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong mean, a run that hangs, or tiles that fail without a reason."""
    output, compute = tmp_path / "o.tif", ContextTiles.compute

    def failing(self: ContextTiles, model, tile, data):  # type: ignore[no-untyped-def]
        if tile.key.number == 5:
            raise ValueError("bad luck")
        return compute(self, model, tile, data)

    with monkeypatch.context() as patch:
        patch.setattr(ContextTiles, "compute", failing)
        manifest = segment(scene, output, model=model, options=options(allow_failed=1))
    assert (manifest["status"], manifest["output"]) == ("partial", None)
    failed = [(row["pass"], row["tile"]) for row in manifest["failed_tiles"]]
    assert sorted(failed) == [("context", 5)] + [("segment", n) for n in range(TILES)]
    assert "context pass: tile 5 failed: ValueError: bad luck" in {
        row["error"] for row in manifest["failed_tiles"]
    }
    segment(scene, output, model=model, options=options())
    assert file_digest(output) == wanted


def test_a_batch_runs_both_passes_of_each_case(scene: Path, model: Path, tmp_path: Path) -> None:
    """Cases share the pool: one would take the other's mean, or its place between the passes."""
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(scene, folder / "a.tif")
    image = np.stack([texture((300, 300), seed=seed) for seed in (7, 8, 9)])
    write_raster(folder / "b.tif", image)
    result = batch([folder], tmp_path / "out", models=[model], options=options())
    assert result["counts"]["done"] == 2
    for name in ("a", "b"):
        source, output = folder / f"{name}.tif", tmp_path / f"{name}.tif"
        alone = segment(source, output, model=model, options=options())
        assert file_digest(tmp_path / "out" / f"{name}.tif") == alone["output_sha256"]


def test_the_plan_counts_both_passes(scene: Path, model: Path, slim: Path) -> None:
    """Twice the trunk would be said to cost as much as once."""
    two = plan(scene, model=model, options=options())
    one = plan(scene, model=model, options=options(context="tile"))
    chain, whole = traced(load_bundle(model), "scene").body, Region.whole((504, 744))
    assert isinstance(chain, Chain)
    needs = needs_of(chain, whole, scored=whole, shape=whole.shape)
    trunk = stage_work(pooled_chain(chain), needs) / stage_work(chain, needs)
    # The second pass alone does less than the one pass, which pools features of its halo, too.
    ratio = one["halo_work_ratio"]
    assert ratio + trunk / 2 < two["halo_work_ratio"] < 2 * ratio
    assert two["read_ratio"] > 1.5 * one["read_ratio"]
    assert (two["exact"], one["exact"]) == (True, False)
    assert two["store_bytes"] == one["store_bytes"] + 8 * 65 * TILES
    assert two["fingerprint"] != one["fingerprint"]
    plain = [plan(scene, model=slim, options=options(context=c)) for c in ("scene", "window")]
    assert plain[0]["halo_work_ratio"] == plain[1]["halo_work_ratio"]
    assert plain[0]["exact"]
    assert not plan(scene, model=model, options=options(halo="16"))["exact"]
