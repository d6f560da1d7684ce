"""Somebody's own network does in the commands what one of ours does."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import rasterio
import torch
from command import Command
from own_networks import Coarse, Hourglass, Squeezed, exported, own_bundle
from scenes import texture, write_raster
from torch import nn
from torchvision.ops import Conv2dNormActivation

from pipeline.models.custom_bundle import save_custom

TIE = 1e-3  # of the logits' deviation
SIZES = {"bands": 3, "classes": 4}


def lively(network: nn.Module) -> nn.Module:
    """Weights by which every class wins somewhere."""
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, std=0.3)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.1)
    return network.eval()


@pytest.fixture(scope="module")
def network() -> Hourglass:
    torch.manual_seed(3)
    return lively(Hourglass(3, 4))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, network: Hourglass) -> Path:
    folder = tmp_path_factory.mktemp("own")
    draft = own_bundle(
        folder / "draft", network, stride=4, entry_point="own_networks:hourglass", arguments=SIZES
    )
    return save_custom(folder / "bundle", draft, network.state_dict()).path


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own: Path
) -> Command:
    return Command(monkeypatch, capsys, own)


@pytest.fixture(scope="module")
def raster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 x 418 px: the second side is no multiple of the stride."""
    image_CYX = np.stack([texture((300, 418), seed=seed) for seed in (1, 2, 3)])
    return write_raster(tmp_path_factory.mktemp("raster") / "scene.tif", image_CYX)


def whole(network: nn.Module, image_CS: np.ndarray, *, stride: int) -> np.ndarray:
    """(K, *S) logits of one plain call over the image, padded as scenes are: the oracle."""
    sides = [(0, -n % stride) for n in image_CS.shape[1:]]
    padded = np.pad(image_CS.astype(np.float32), [(0, 0), *sides], mode="reflect")
    image_BCS = torch.from_numpy((padded - 1000) / 300)[None]
    with torch.inference_mode():
        logits_BKS = network(image_BCS)
        if logits_BKS.shape[2:] != image_BCS.shape[2:]:
            mode = {4: "bilinear", 5: "trilinear"}[logits_BKS.ndim]
            size = image_BCS.shape[2:]
            logits_BKS = nn.functional.interpolate(logits_BKS, size=size, mode=mode)
    return logits_BKS[0].numpy()[(slice(None), *(slice(0, n) for n in image_CS.shape[1:]))]


def wrong(labels_S: np.ndarray, logits_KS: np.ndarray) -> int:
    """Labels that are not the best class, near ties left out."""
    best = np.sort(logits_KS, axis=0)
    tie_S = best[-1] - best[-2] <= TIE * logits_KS.std()
    return int(((labels_S != logits_KS.argmax(axis=0)) & ~tie_S).sum())


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return np.asarray(file.read())


@pytest.mark.parametrize("tile", [64, 128, 512])
def test_a_raster_in_tiles_equals_one_pass(
    command: Command, own: Path, raster: Path, network: Hourglass, tmp_path: Path, tile: int
) -> None:
    """The halo that was found is too short, or an origin lies off the stride."""
    output = tmp_path / "o.tif"
    manifest = command.segment(raster, output, "--tile", tile, model=own).manifest
    logits_KS = whole(network, read(raster), stride=4)
    assert manifest["halo"]["exact"]
    assert manifest["halo"]["before"] == [20, 20]
    assert len(np.unique(logits_KS.argmax(0))) == 4
    assert wrong(read(output)[0], logits_KS) == 0
    assert manifest["seam"]["passed"] is (None if tile == 512 else True)


def test_without_a_halo_labels_at_the_seams_differ(
    command: Command, own: Path, raster: Path, network: Hourglass, tmp_path: Path
) -> None:
    """The check above can fail."""
    output = tmp_path / "o.tif"
    manifest = command.segment(
        raster, output, "--tile", 64, "--halo", 0, "--crf", "off", model=own
    ).manifest
    assert not manifest["halo"]["exact"]
    assert wrong(read(output)[0], whole(network, read(raster), stride=4)) > 100


def test_a_program_gives_the_labels_of_the_module_that_it_was_made_of(
    command: Command, raster: Path, network: Hourglass, tmp_path: Path
) -> None:
    """A program would run at its example's size, or without its weights."""
    draft = own_bundle(tmp_path / "draft", exported(network, stride=4), stride=4)
    bundle = save_custom(tmp_path / "b", draft, draft.weights_file.read_bytes())
    output = tmp_path / "o.tif"
    manifest = command.segment(raster, output, "--tile", 128, model=bundle.path).manifest
    assert manifest["halo"]["before"] == [20, 20]
    assert wrong(read(output)[0], whole(network, read(raster), stride=4)) == 0


def test_a_volume_is_segmented_by_logits_of_a_quarter_of_its_size(
    command: Command, tmp_path: Path
) -> None:
    """In three dimensions labels would lie elsewhere, or tiles would be cut off the stride."""
    torch.manual_seed(1)
    network = lively(Coarse(1, 4, dims=3))
    arguments = {"bands": 1, "classes": 4, "dims": 3}
    draft = own_bundle(
        tmp_path / "draft", network, stride=4, dims=3, bands=1,
        entry_point="own_networks:Coarse", arguments=arguments,
    )  # fmt: skip
    bundle = save_custom(tmp_path / "b", draft, network.state_dict())
    image_ZYX = texture((41, 50, 66), seed=4).astype(np.int16)
    scan, output = tmp_path / "scan.nii.gz", tmp_path / "o.nii.gz"
    nib.save(nib.Nifti1Image(image_ZYX.T, np.eye(4)), scan)
    manifest = command.segment(scan, output, "--tile", 32, model=bundle.path).manifest
    assert manifest["tiles"]["total"] == 12
    labels_ZYX = np.asarray(nib.load(output).dataobj).T
    assert wrong(labels_ZYX, whole(network, image_ZYX[None], stride=4)) == 0


def test_workers_import_the_entry_point_and_give_the_same_file(
    command: Command, raster: Path, tmp_path: Path, cluster: None
) -> None:
    """A network would run in this process alone."""
    torch.manual_seed(2)
    arguments = {"in_channels": 3, "out_channels": 4, "kernel_size": 5}
    network = lively(Conv2dNormActivation(**arguments))
    bundle = own_bundle(
        tmp_path / "b", network, stride=1, entry_point="torchvision.ops:Conv2dNormActivation",
        arguments=arguments,
    )  # fmt: skip
    digests = {}
    for name, more in (("a", ()), ("b", ("--backend", "ray", "--workers", 2))):
        manifest = command.segment(
            raster, tmp_path / f"{name}.tif", "--tile", 128, *more, model=bundle.path
        ).manifest
        digests[name] = manifest["output_sha256"]
        assert manifest["versions"]["torchvision"] == version("torchvision")
    assert digests["a"] == digests["b"]


def test_plan_show_and_probe_say_what_they_say_of_other_networks(
    command: Command, own: Path, raster: Path
) -> None:
    """A command would fail where a network has no stages."""
    plan = command("plan", raster, "--model", own, "--tile", 128, "--json").manifest
    assert (plan["exact"], plan["stages"], plan["windows"]["kind"]) == (True, 1, "none")
    assert plan["receptive_field"] == [44, 44]
    # 12 tiles of 128 px, each with 20 px around it but at the scene's border.
    assert 1.5 < plan["halo_work_ratio"] < 1.7
    assert command("model", "show", own, "--json").manifest["halo_before"] == [20, 20]
    probe = command("model", "probe", own, "--json").manifest
    assert (probe["verdict"], probe["probe_before"]) == ("LOCAL", [20, 20])
    command("plan", raster, "--model", own, "--windows", "canonical").refuses("runs as one")


def test_a_finished_run_is_certified_again(
    command: Command, own: Path, raster: Path, tmp_path: Path
) -> None:
    """The reference would be taken apart, or run in other windows."""
    command.segment(raster, tmp_path / "o.tif", "--tile", 128, model=own)
    seam = command("certify", tmp_path / "o.tif.run", "--json").manifest
    assert (seam["exact"], seam["passed"]) == (True, True)
    assert seam["max_deviations"] < 1e-4


def test_a_network_that_mixes_the_scene_runs_with_context_tile_alone(
    command: Command, raster: Path, tmp_path: Path
) -> None:
    """Its mask would be called exact, and have seams."""
    torch.manual_seed(0)
    network = lively(Squeezed(3, 4))
    draft = own_bundle(
        tmp_path / "d", network, stride=1, entry_point="own_networks:Squeezed", arguments=SIZES
    )
    bundle, output = save_custom(tmp_path / "b", draft, network.state_dict()), tmp_path / "o.tif"
    command.segment(raster, output, "--tile", 128, model=bundle.path).refuses(
        "GLOBAL", "gate at fault", "--context tile"
    )
    manifest = command.segment(
        raster, output, "--tile", 128, "--context", "tile", model=bundle.path
    ).manifest
    assert (manifest["halo"]["exact"], manifest["context"]) == (False, "tile")
    assert manifest["seam"]["passed"] is None
    assert manifest["seam"]["max_abs_logit"] > 0
