"""SegNet and U-Net, made as DeepLab is made, and run as somebody's own network is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import fresh
from torch import Tensor, nn
from torchvision.models import vgg16_bn

from pipeline.domain import Grid, Halo, Pass, Region
from pipeline.errors import BundleError
from pipeline.models.baselines import BASELINES, baseline
from pipeline.models.bundle import Architecture, Bundle, CustomArchitecture
from pipeline.models.custom_network import CustomNetwork
from pipeline.models.custom_reach import custom_reach, known_probe
from pipeline.models.frame import Frame
from pipeline.models.fresh import new_bundle
from pipeline.models.segnet import SegNet
from workflows import model


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Narrow maps: threads would cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A SegNet of four channels where there are 64."""
    asked = baseline("segnet", "vgg16", dims=2, bands=3, classes=4)
    asked = replace(asked, arguments={**asked.arguments, "width": 4})
    folder = tmp_path_factory.mktemp("segnet") / "bundle"
    return new_bundle(folder, architecture=asked, bands=3, classes=4, seed=0)


def noise(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(1)).double()


def test_the_encoder_is_torchvisions_key_for_key_and_value_for_value() -> None:
    """Weights of ImageNet, with which SegNet is trained, would not load or mean something else."""
    torch.manual_seed(2)
    theirs, ours = vgg16_bn(weights=None).features.eval(), SegNet(3, 5).eval()
    ours.encoder.load_state_dict(theirs.state_dict(), strict=True)
    seen = []
    ours.encoder[-1].register_forward_hook(lambda _, __, output: seen.append(output[0]))
    image_BCS = noise((64, 96)).float()
    with torch.inference_mode():
        assert ours(image_BCS).shape == (1, 5, 64, 96)
        assert torch.equal(seen[0], theirs(image_BCS))


def test_it_has_as_many_parameters_as_published() -> None:
    """A layer would be missing: 14.7 million in the encoder (section 3), as many to mirror it.

    A decoder's stage ends with the width of the next: 256 channels fewer than a mirror's would be.
    """
    with torch.device("meta"):
        network = SegNet(3, 11)
    encoder, decoder = (
        sum(weight.numel() for weight in part.parameters())
        for part in (network.encoder, network.decoder)
    )
    assert round(encoder / 1e6, 1) == 14.7
    first, last = 3 * 64 * 9 + 3 * 64, 64 * 11 * 9 + 11
    widths_that_fall = 64 + 128 + 256  # biases and norms are as wide as what comes out
    assert decoder - last == encoder - first - 3 * widths_that_fall


def unpooled(features_BCS: Tensor, before_BCS: Tensor) -> Tensor:
    """Features at the first greatest of each 2x2 places of what was pooled, 0 at the others."""
    _, channels, rows, columns = features_BCS.shape
    windows = before_BCS.reshape(channels, rows, 2, columns, 2).movedim(2, 3).flatten(3)
    chosen = np.eye(4)[windows.numpy().argmax(axis=3)]
    spread = torch.from_numpy(chosen) * features_BCS[0, ..., None]
    return spread.unflatten(3, (2, 2)).movedim(3, 2).reshape(1, channels, 2 * rows, 2 * columns)


def test_values_go_back_to_where_the_maxima_were(narrow: Bundle) -> None:
    """Borders would blur: an unpooling that repeats, or takes another stage's places."""
    network = narrow.network()
    assert isinstance(network, CustomNetwork)
    network.double()
    image_BCS = features_BCS = noise((64, 32))
    before = []
    with torch.inference_mode():
        for layer in network.module.encoder:
            if isinstance(layer, nn.MaxPool2d):
                before.append(features_BCS)
                features_BCS = nn.functional.max_pool2d(features_BCS, 2)
            else:
                features_BCS = layer(features_BCS.clone())
        for stage in network.module.decoder:
            features_BCS = stage(unpooled(features_BCS, before.pop()))
        found_BKS = network(image_BCS, Frame((0, 0), (64, 32)))
    assert (found_BKS - features_BCS).abs().max() < 1e-12
    assert before == []


def test_a_fresh_segnet_gives_all_classes(narrow: Bundle) -> None:
    """One class everywhere would show nothing of a machine."""
    network = narrow.network()
    with torch.inference_mode():
        labels = network(noise((96, 96)).float(), Frame((0, 0), (96, 96)))[0].argmax(0)
    assert (torch.bincount(labels.flatten(), minlength=4) > 0.02 * 96 * 96).all()
    assert narrow.name == "fresh-segnet"


def test_tiles_of_a_segnet_agree_with_one_pass(narrow: Bundle) -> None:
    """A maximum's place would be counted from the tile's corner, or the halo be too short."""
    network = narrow.network()
    assert isinstance(network, CustomNetwork)
    network.double()
    reach = custom_reach(network, known_probe(network), crop=narrow.crop, context="window")
    assert reach.halo == Halo.uniform(192, ndim=2)
    grid = Grid(shape=(70, 515), tile=(96, 64), stride=32)
    sweep = Pass(case="", name="", grid=grid, reach=reach, crf_halo=Halo.uniform(0, ndim=2))
    scene_BCS, whole = noise(grid.padded_shape), Region.whole(grid.padded_shape)
    parts = 0
    with torch.inference_mode():
        whole_BKS = network(scene_BCS, Frame((0, 0), grid.padded_shape))
        for tile in sweep.tiles():
            parts += tile.read != whole
            part_BCS = scene_BCS[(..., *tile.read.slices(within=whole))]
            found_BKS = network(part_BCS, Frame.of(tile.read, shape=grid.padded_shape))
            found_BKS = found_BKS[(..., *tile.core.slices(within=tile.read))]
            want_BKS = whole_BKS[(..., *tile.core.slices(within=whole))]
            assert (found_BKS - want_BKS).abs().max() <= 1e-9 * whole_BKS.std()
    assert parts > 4


def test_a_unet_is_the_librarys(tmp_path: Path) -> None:
    """A family of the command would name what nobody can import, or another stride."""
    pytest.importorskip("segmentation_models_pytorch", reason="the extra 'baselines'")
    bundle = fresh(tmp_path / "b", family="unet", backbone=None)
    network = bundle.network()
    assert type(network.module).__name__ == "Unet"
    with torch.inference_mode():
        labels = network(noise((96, 96)).float(), Frame((0, 0), (96, 96)))[0].argmax(0)
    assert (torch.bincount(labels.flatten(), minlength=4) > 0).all()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"family": "segnet", "backbone": "resnet18"}, "has the backbone vgg16, not 'resnet18'"),
        ({"family": "segnet", "backbone": None, "output_stride": 8}, "a stride of its own"),
        ({"family": "unet", "backbone": None, "dims": 3}, "for 2-D images, dims is 3"),
        ({"family": "v1", "backbone": "slim"}, "family v1 has no backbone 'slim'"),
    ],
)
def test_a_baseline_that_is_not_there_is_refused(
    tmp_path: Path, asked: dict[str, object], message: str
) -> None:
    """Another network than the one that was asked for would be written."""
    with pytest.raises(BundleError, match=message):
        fresh(tmp_path / "b", **asked)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("family", ["v1", "v2", "v3", "v3plus", "fcn", "segnet", "unet"])
def test_a_family_alone_is_built_on_a_trunk_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """``model new --family v1`` would be refused for a trunk that nobody named."""
    made: list[Architecture | CustomArchitecture] = []
    monkeypatch.setattr(model, "new_bundle", lambda _, **asked: made.append(asked["architecture"]))
    fresh(tmp_path / "b", family=family, backbone=None)
    assert made[0].family == ("custom" if family in BASELINES else family)
