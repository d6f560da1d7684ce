"""Sizes and mirror images of the scene, averaged, with everything else that a command may ask."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
from command import Command
from own_networks import Hourglass, own_bundle
from scenes import fresh, texture, write_raster
from torch import Tensor
from torch.nn import functional as F

from adapters.uri import open_source
from pipeline.domain import Region
from pipeline.inference.padding import read_padded
from pipeline.models.architecture import Architecture
from pipeline.models.bundle import Bundle, load_bundle, save_bundle
from pipeline.models.frame import Frame
from pipeline.models.fresh import new_bundle
from pipeline.models.published import published
from workflows import model

SHAPE = (75, 603)
"""Of the scene, in px: multiples of nothing, longer than the halo of half its size."""

BOTH = "scale:0.5,1,1.25+flip:x"
CRF = {"iterations": 2, "smoothness": {"weight": 3, "position": 3}}


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], slim: Path
) -> Command:
    return Command(monkeypatch, capsys, slim)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image_CYX = np.stack([texture(SHAPE, seed=seed) for seed in (1, 2, 3)])
    return write_raster(tmp_path_factory.mktemp("average") / "scene.tif", image_CYX)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(3)
    network = Hourglass(3, 4)
    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            torch.nn.init.normal_(layer.weight, std=0.3)
    folder = tmp_path_factory.mktemp("own")
    sizes = {"bands": 3, "classes": 4}
    return own_bundle(
        folder / "b", network, stride=4, entry_point="own_networks:hourglass", arguments=sizes
    )


def mean_by_torch(
    bundle: Bundle, scene: Path, *, stride: int, sizes: str = "1", turned: bool = False
) -> np.ndarray:
    """(K, *S) probabilities from the whole scene, resized by torch: the oracle."""
    network, source = bundle.network(), open_source(str(scene))
    end, corners = int(network.align_corners), network.align_corners
    shape = tuple(-(-(n - end) // stride) * stride + end for n in source.info.shape)
    image_CS = read_padded(source, Region.whole(shape)).image_CS.astype(np.float32)
    scaling = bundle.input.scaling
    scene_BCS = torch.from_numpy((image_CS - scaling.mean[0]) / scaling.std[0])[None]

    def resized(values_BCS: Tensor, size: tuple[int, ...]) -> Tensor:
        return F.interpolate(values_BCS, size=size, mode="bilinear", align_corners=corners)

    parts = []
    for factor in map(Fraction, sizes.split(",")):
        size = tuple(int((n - end) * factor) + end for n in shape)
        for dims in ([], [3])[: 1 + turned]:
            with torch.inference_mode():
                image_BCS = resized(scene_BCS.flip(dims), size)
                scores_BKS = network.coarse_logits(image_BCS, Frame((0, 0), size))
            parts.append(resized(scores_BKS, shape).double().softmax(1).flip(dims)[0])
    height, width = source.info.shape
    return torch.stack(parts).mean(0)[:, :height, :width].numpy()


def wrong(mask: Path, prob_KS: np.ndarray) -> int:
    """Labels that are not the best class, near ties left out."""
    with rasterio.open(mask) as file:
        labels_S = file.read(1)
    best = np.sort(prob_KS, axis=0)
    tie_S = best[-1] - best[-2] <= 1e-4
    assert tie_S.mean() < 0.01
    return int(((labels_S != prob_KS.argmax(axis=0)) & ~tie_S).sum())


def test_sizes_and_mirror_images_are_averaged_certified_and_told(
    command: Command, scene: Path, tmp_path: Path
) -> None:
    """A mask would not be the mean that its tags name, or its seams go unseen."""
    asked = replace(published("v3", "slim"), align_corners=True)
    bundle = new_bundle(tmp_path / "model", architecture=asked, bands=3, classes=4, seed=2)
    mask = tmp_path / "mask.tif"
    line = (scene, mask, "--crf", "off", "--tile", 128, "--average")
    found = command.segment(*line, BOTH, model=bundle.path)
    assert found.code == 0, found.err
    manifest = found.manifest
    assert (manifest["average"], manifest["tiles"]["total"]) == (BOTH, 5)
    assert manifest["halo"]["exact"]
    assert manifest["seam"]["passed"], manifest["seam"]
    with rasterio.open(mask) as file:
        assert file.tags()["TERRAVOX_AVERAGE"] == BOTH
    mean_KS = mean_by_torch(bundle, scene, stride=16, sizes="0.5,1,1.25", turned=True)
    assert wrong(mask, mean_KS) == 0
    assert wrong(mask, mean_by_torch(bundle, scene, stride=16)) > 100
    command.segment(*line, "scale:0.5,1", model=bundle.path).refuses("--fresh")
    certified = command("certify", f"{mask}.run", "--json")
    assert certified.code == 0, certified.err
    assert certified.manifest["passed"]


def test_one_actor_or_two_give_the_bytes_of_none(
    command: Command, scene: Path, tmp_path: Path, cluster: None
) -> None:
    """The recipe would lose its sizes on the way to an actor, or the CRF see other scores."""
    crf = tmp_path / "crf.yaml"
    crf.write_text(yaml.safe_dump({"crf": CRF}))
    digests = set()
    for name, more in (("serial", ()), ("ray", ("--backend", "ray", "--workers", 2))):
        line = (scene, tmp_path / f"{name}.tif", "--tile", 128, "--average", BOTH, "--crf", crf)
        digests.add(command.segment(*line, *more).manifest["output_sha256"])
    assert len(digests) == 1


def test_somebodys_own_network_is_averaged_alone_and_in_a_batch(
    command: Command, scene: Path, own: Bundle, tmp_path: Path
) -> None:
    """It runs as one: its halo, which a probe found, would be too short for half the size."""
    line = ("--crf", "off", "--tile", 128, "--average", BOTH)
    mask = tmp_path / "mask.tif"
    manifest = command.segment(scene, mask, *line, model=own.path).manifest
    assert manifest["seam"]["passed"], manifest["seam"]
    assert wrong(mask, mean_by_torch(own, scene, stride=16, sizes="0.5,1,1.25", turned=True)) == 0
    folder = tmp_path / "masks"
    done = command(
        "batch", scene, "-o", folder, "--model", own.path, "--backend", "serial",
        "--tracking-uri", "none", "--precision", "fp32", "--json", *line,
    )  # fmt: skip
    assert done.code == 0, done.err
    with rasterio.open(mask) as one, rasterio.open(folder / "scene.tif") as other:
        assert np.array_equal(one.read(), other.read())


def test_a_measured_halo_is_that_of_the_average(
    command: Command, scene: Path, tmp_path: Path
) -> None:
    """A halo that serves the scene as it is would be taken for half its size."""
    line = (scene, tmp_path / "mask.tif", "--crf", "off", "--tile", 128, "--average", BOTH)
    found = command.segment(*line, "--halo", "auto:1e-2")
    assert found.code == 0, found.err
    exact = command("plan", scene, "--model", command.model, "--average", BOTH, "--json").manifest
    assert 0 < found.manifest["halo"]["before"][0] <= exact["halo"]["before"][0]
    assert not found.manifest["halo"]["exact"]
    assert found.manifest["seam"]["label_disagreement"] < 0.1


def test_the_plan_counts_every_pass(command: Command, scene: Path) -> None:
    """A night's work would be planned as one of its passes, and memory as that of one."""
    plans = {}
    for average in ("none", "scale:1", "scale:1+flip:x", "scale:0.5", "scale:1,2"):
        asked = ("plan", scene, "--model", command.model, "--tile", 256, "--crf", "off")
        plans[average] = command(*asked, "--average", average, "--json").manifest
    work = {average: plan["multiply_adds"] for average, plan in plans.items()}
    assert work["scale:1"] == work["none"]
    assert work["scale:1+flip:x"] == 2 * work["none"]
    assert work["scale:1,2"] > 4 * work["none"]
    assert 0.2 * work["none"] < work["scale:0.5"] < work["none"]
    memory = {average: plan["device_bytes"] for average, plan in plans.items()}
    assert memory["scale:1,2"] > 3 * memory["none"]
    assert plans["scale:0.5"]["tile_stride"] == 2 * plans["none"]["tile_stride"]
    halos = {average: plan["halo"]["before"][0] for average, plan in plans.items()}
    assert halos["scale:0.5"] >= 2 * halos["none"] - 16


@pytest.mark.parametrize(
    ("average", "words"),
    [
        ("scale:0.6", ("scale:0.6", "quarters")),
        ("scale:", ("must be", "scale:0.75,1,1.25")),
        ("scale:1+scale:2", ("must be",)),
        ("", ("must be",)),
    ],
)
def test_an_average_that_cannot_be_is_refused(
    command: Command, scene: Path, tmp_path: Path, average: str, words: tuple[str, ...]
) -> None:
    """Another average than asked for would be taken."""
    command.segment(scene, tmp_path / "m.tif", "--average", average).refuses(*words)


def test_the_weights_of_stride_16_run_at_8(command: Command, tmp_path: Path) -> None:
    """A run would say one stride and compute another, or one go on with the other's tiles."""
    image_CYX = np.stack([texture((40, 150), seed=seed) for seed in (1, 2, 3)])
    scene = write_raster(tmp_path / "scene.tif", image_CYX)
    asked = replace(
        published("v3", "resnet18", output_stride=16), rates=(1,), width=32, image_pooling=False
    )
    coarse = new_bundle(tmp_path / "model", architecture=asked, bands=3, classes=4, seed=2)
    mask, fine = tmp_path / "mask.tif", coarse.at_stride(8)
    line = (scene, mask, "--crf", "off", "--tile", 64)
    found = command.segment(*line, "--output-stride", 8, model=coarse.path)
    assert found.code == 0, found.err
    assert found.manifest["output_stride"] == 8
    assert found.manifest["model"]["digest"] == fine.digest != coarse.digest
    assert found.manifest["seam"]["passed"], found.manifest["seam"]
    with rasterio.open(mask) as file:
        assert file.tags()["TERRAVOX_OUTPUT_STRIDE"] == "8"
    assert wrong(mask, mean_by_torch(fine, scene, stride=8)) == 0
    assert wrong(mask, mean_by_torch(coarse, scene, stride=16)) > 100
    command.segment(*line, model=coarse.path).refuses("--fresh")
    certified = command("certify", f"{mask}.run", "--json")
    assert certified.code == 0, certified.err


def test_a_stride_that_a_network_does_not_have_is_refused(
    command: Command, scene: Path, own: Bundle, tmp_path: Path
) -> None:
    """It would run at its own, and the run be recorded as if it had not."""
    line = (scene, tmp_path / "m.tif", "--output-stride", 16)
    command.segment(*line, model=own.path).refuses("custom network")
    command.segment(*line).refuses("slim", "stride 16")


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--family v1 --backbone vgg16 --multi-scale", "multi_scale", "features"),
        ("--family v2 --backbone vgg16 --multi-scale", "multi_scale", "inputs"),
        ("--backbone medicalnet10 --dims 3 --slice-stride 2", "slice_stride", 2),
        ("--backbone resnet18 --output-stride 16", "output_stride", 16),
    ],
)
def test_model_new_makes_what_it_is_asked_for(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: str,
    field: str,
    value: object,
) -> None:
    """The network would be another than the one that was asked for."""
    asked: list[Architecture] = []
    monkeypatch.setattr(model, "new_bundle", lambda _, **given: asked.append(given["architecture"]))
    made = command("model", "new", "-o", tmp_path / "m", *words.split())
    assert made.code == 0, made.err
    assert getattr(asked[0], field) == value


def test_model_new_replaces_what_is_untrained_and_nothing_else(
    command: Command, tmp_path: Path
) -> None:
    """A mistyped directory would cost the weights of a week's training."""
    bundle = fresh(tmp_path / "m")
    line = ("model", "new", "-o", bundle.path, "--classes", 3)
    assert command(*line).code == 0
    made = load_bundle(bundle.path)
    assert len(made.classes) == 3
    weights = made.weights_file.read_bytes()
    trained = save_bundle(bundle.path, replace(made, training={"steps": 9000}), weights)
    command(*line).refuses(bundle.path, "were trained", "another directory")
    assert load_bundle(bundle.path) == trained


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--backbone resnet18 --multi-scale", "multi_scale"),
        ("--family fcn --backbone resnet50 --multi-scale", "multi_scale None"),
        ("--backbone slim --slice-stride 2", "volumes have slices"),
    ],
)
def test_model_new_refuses_what_a_family_does_not_have(
    command: Command, tmp_path: Path, words: str, complaint: str
) -> None:
    """The option would be read and do nothing."""
    command("model", "new", "-o", tmp_path / "m", *words.split()).refuses(complaint)
    assert not (tmp_path / "m").exists()
