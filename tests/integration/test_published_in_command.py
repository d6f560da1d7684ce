"""Published networks, and passes over mirror images, through the command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from command import Command
from scenes import fresh, texture, write_raster

from pipeline.inference.padding import reflected
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.models.frame import Frame
from pipeline.models.fresh import new_bundle
from pipeline.models.published import published

RUN = ("--crf", "off", "--precision", "fp32", "--backend", "serial", "--tracking-uri", "none")
SHAPE = (43, 443)
"""Of the scene, in px: multiples of nothing, longer than the halo of v1."""


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    return Command(monkeypatch, capsys, tmp_path / "model")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image_CYX = np.stack([texture(SHAPE, seed=seed) for seed in (1, 2, 3)])
    return write_raster(tmp_path_factory.mktemp("published") / "scene.tif", image_CYX)


def plain_probabilities(
    bundle: Bundle, scene: Path, passes: Sequence[tuple[int, ...]] = ((),)
) -> np.ndarray:
    """(K, *S) from whole scenes, mirrored and padded by plain means: the oracle."""
    network = bundle.network()
    step, end = network.stride, int(network.align_corners)
    with rasterio.open(scene) as file:
        image_CS = file.read().astype(np.float32)
    sides = [-(-(n - end) // step) * step + end for n in SHAPE]
    rows, columns = (reflected(np.arange(a), n) for a, n in zip(sides, SHAPE, strict=True))
    scaling = bundle.input.scaling
    padded_CS = (image_CS[:, rows][:, :, columns] - scaling.mean[0]) / scaling.std[0]
    image_BCS = torch.from_numpy(padded_CS)[None]
    parts = []
    for axes in passes:
        dims = [2 + axis for axis in axes]
        with torch.inference_mode():
            logits_BKS = network(image_BCS.flip(dims), Frame((0, 0), tuple(sides)))
        parts.append(logits_BKS.double().softmax(1).flip(dims)[0])
    return torch.stack(parts).mean(0)[:, : SHAPE[0], : SHAPE[1]].numpy()


def wrong(mask: Path, prob_KS: np.ndarray) -> int:
    """Labels that are not the best class, near ties left out."""
    with rasterio.open(mask) as file:
        labels_S = file.read(1)
    best = np.sort(prob_KS, axis=0)
    tie_S = best[-1] - best[-2] <= 1e-4
    assert tie_S.mean() < 0.01
    return int(((labels_S != prob_KS.argmax(axis=0)) & ~tie_S).sum())


def test_v1_in_tiles_is_v1_in_one_piece(command: Command, scene: Path, tmp_path: Path) -> None:
    """A network that aligns corners would be padded, cut or upsampled as one that does not."""
    made = command("model", "new", "-o", command.model, "--family", "v1", "--backbone", "vgg16",
                   "--classes", 4, "--seed", 1)  # fmt: skip
    assert made.code == 0, made.err
    mask = tmp_path / "mask.tif"
    done = command("segment", scene, "-o", mask, "--model", command.model, *RUN,
                   "--tile", 128, "--halo", "exact", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.manifest["tiles"]["total"] == 4
    assert done.manifest["halo"]["before"] == [224, 224]
    assert done.manifest["halo"]["exact"]
    assert done.manifest["seam"]["passed"]
    assert wrong(mask, plain_probabilities(load_bundle(command.model), scene)) == 0


def test_probe_and_arithmetic_agree_where_corners_are_aligned(command: Command) -> None:
    """Strips would have sides that the network is not made for, or the halo be that of others."""
    aligned = replace(published("v3plus", "slim"), align_corners=True)
    new_bundle(command.model, architecture=aligned, bands=1, classes=2, seed=1)
    found = command("model", "probe", command.model, "--json")
    assert found.code == 0, found.err
    assert found.manifest["verdict"] == "LOCAL"
    for end in ("before", "after"):
        assert found.manifest[f"probe_{end}"] == found.manifest[f"interval_{end}"]


@pytest.mark.parametrize("aligned", [False, True], ids=["strides", "corners"])
def test_mirror_images_are_averaged_and_certified(
    command: Command, scene: Path, tmp_path: Path, aligned: bool
) -> None:
    """Mirrored tiles would not be those of the mirrored scene, or a run not say what it did."""
    architecture = replace(published("v3", "slim"), align_corners=aligned)
    bundle = new_bundle(command.model, architecture=architecture, bands=3, classes=4, seed=2)
    masks = {name: tmp_path / f"{name[-2:]}.tif" for name in ("none", "flip:yx")}
    found = {}
    for name, mask in masks.items():
        done = command("segment", scene, "-o", mask, "--model", command.model, *RUN,
                       "--tile", 128, "--average", name, "--json")  # fmt: skip
        assert done.code == 0, done.err
        found[name] = done.manifest
        assert found[name]["average"] == name
        assert found[name]["seam"]["passed"], found[name]["seam"]
        with rasterio.open(mask) as file:
            assert file.tags()["TERRAVOX_AVERAGE"] == name
    assert found["none"]["fingerprint"] != found["flip:yx"]["fingerprint"]
    mean_KS = plain_probabilities(bundle, scene, ((), (0,), (1,), (0, 1)))
    assert wrong(masks["flip:yx"], mean_KS) == 0
    assert wrong(masks["none"], mean_KS) > 100
    certified = command("certify", f"{masks['flip:yx']}.run", "--json")
    assert certified.code == 0, certified.err
    assert certified.manifest["passed"]


def test_a_short_halo_under_mirror_images_is_measured(
    command: Command, scene: Path, tmp_path: Path
) -> None:
    """The certificate would compare tiles with themselves."""
    fresh(command.model)
    done = command("segment", scene, "-o", tmp_path / "m.tif", "--model", command.model, *RUN,
                   "--tile", 64, "--average", "flip:x", "--halo", 8, "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.manifest["seam"]["max_deviations"] > 1e-3
    assert not done.manifest["seam"]["exact"]


def test_mirror_images_that_cannot_be_are_refused(
    command: Command, scene: Path, tmp_path: Path
) -> None:
    """Another average than asked for would be taken, or a mean of the scene that is not its own."""
    pooled = replace(published("v3", "slim"), image_pooling=True)
    new_bundle(command.model, architecture=pooled, bands=3, classes=2, seed=0)
    line = ("segment", scene, "-o", tmp_path / "m.tif", "--model", command.model)
    command(*line, "--average", "flip:z").refuses("--average flip:z", "y, x")
    command(*line, "--average", "mirror").refuses("--average must be", "flip:yx", "mirror")
    command(*line, "--average", "flip:x", "--context", "scene").refuses("--context window or tile")


def test_squeeze_and_excitation_runs_with_context_tile_alone(
    command: Command, scene: Path, tmp_path: Path
) -> None:
    """MobileNetV3 would be called exact, or have no certificate."""
    fresh(command.model, backbone="mobilenetv3-large")
    line = ("segment", scene, "-o", tmp_path / "m.tif", "--model", command.model, *RUN)
    command(*line).refuses("backbone.4.block.2 (SqueezeExcitation)", "context 'tile'")
    done = command(*line, "--context", "tile", "--halo", 64, "--tile", 128, "--json")
    assert done.code == 0, done.err
    assert done.manifest["context"] == "tile"
    assert not done.manifest["halo"]["exact"]
    seam = done.manifest["seam"]
    assert (seam["exact"], seam["passed"]) == (False, None)
    assert seam["max_deviations"] > 1e-3
    shown = command("model", "show", command.model, "--json").manifest
    assert shown["halo_before"] is None
