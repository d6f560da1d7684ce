from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, deeplabv3_resnet50

from pipeline.models.architecture import Decoder
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.models.deeplab import build_network
from pipeline.models.frame import Frame
from pipeline.models.layouts.registry import LAYOUTS
from pipeline.models.published import published
from tests.command import Command
from tests.foreign_weights import abroad

VAINF = published("v3", "resnet18", output_stride=16)
SMP = replace(
    published("v3plus", "resnet18", output_stride=16),
    rates=(12, 24, 36),
    align_corners=True,
    dilate_first=True,
    width=256,
    separable="bare",
    smoothing=True,
    decoder=Decoder(low=48, widths=(256,)),
)


@pytest.fixture
def terravox(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys, Path())


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A v3 on ResNet-18 of five classes, as vainf saves it."""
    torch.manual_seed(0)
    network = shaken(build_network(VAINF, bands=3, classes=5))
    path = tmp_path / "best_deeplabv3_resnet18.pth"
    torch.save({"model_state": abroad(LAYOUTS["vainf"], network, like={})}, path)
    return path


def shaken(network: Any) -> Any:
    """The network in eval mode, its batch norms with statistics of their own."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2.0)
            layer.bias.data.normal_(0, 0.3)
    return network.eval()


def logits(bundle: Bundle, image_BCS: Tensor) -> Tensor:
    network = bundle.network().pool_over(None).double()
    with torch.inference_mode():
        found: Tensor = network(image_BCS, Frame((0, 0), tuple(image_BCS.shape[2:])))
    return found


def imported(terravox: Command, file: Path, layout: str, *more: object) -> Bundle:
    out = file.parent / "bundle"
    answer = terravox("model", "import", file, "--layout", layout, "-o", out, *more)
    assert answer.code == 0, answer.err
    assert answer.out == f"{out}\n"
    return load_bundle(out)


@pytest.mark.parametrize(
    ("make", "backbone"),
    [(deeplabv3_resnet50, "resnet50"), (deeplabv3_mobilenet_v3_large, "mobilenetv3-large")],
)
def test_torchvisions_weights_give_its_output(
    terravox: Command, tmp_path: Path, make: Callable[..., nn.Module], backbone: str
) -> None:
    """Published weights would run in another network: rates, order, resize or epsilon."""
    torch.manual_seed(1)
    theirs = shaken(make(weights=None, weights_backbone=None, num_classes=21, aux_loss=True))
    torch.save(theirs.state_dict(), tmp_path / "coco.pth")
    bundle = imported(terravox, tmp_path / "coco.pth", "torchvision")
    image_BCS = torch.randn(1, 3, 64, 80).double()
    with torch.inference_mode():
        want_BKS = theirs.double()(image_BCS)["out"]
    assert (logits(bundle, image_BCS) - want_BKS).abs().max() < 1e-6 * want_BKS.std()
    assert bundle.architecture.backbone == backbone
    assert [bundle.classes[n].name for n in (0, 1, 20)] == ["background", "aeroplane", "tvmonitor"]
    assert bundle.training["imported"]["file"] == "coco.pth"
    assert bundle.training["imported"]["classes"] == "PASCAL VOC 2012, by their number"


RGB, BGR = ("red", "green", "blue"), ("blue", "green", "red")
IMAGENET = ((0 - 0.485) / 0.229, (1 - 0.485) / 0.229)


@pytest.mark.parametrize(
    ("layout", "backbone", "bands", "black_white"),
    [
        ("torchvision", "resnet50", RGB, IMAGENET),
        ("vainf", "resnet50", RGB, IMAGENET),
        ("jfzhang", "resnet101", RGB, IMAGENET),
        ("smp", "resnet50", RGB, IMAGENET),
        ("mmseg", "resnet50c", RGB, IMAGENET),
        ("timm", "resnet50", RGB, IMAGENET),
        ("timm", "xception41", RGB, (-1, 1)),
        ("tf", "xception65", RGB, (-1, 1)),
        ("tf", "resnet101-beta", RGB, (-1, 1)),
        ("tf", "resnet101-tf", RGB, (-123.15, 255 - 123.15)),
        ("kazuto", "resnet101", BGR, (-104.008, 255 - 104.008)),
    ],
)
def test_pixels_are_scaled_as_the_weights_were_trained(
    layout: str, backbone: str, bands: tuple[str, ...], black_white: tuple[float, float]
) -> None:
    """Colours would be swapped, or far from what the first layer knows."""
    form = LAYOUTS[layout]
    family = "v2" if layout == "kazuto" else "v3"
    (mean, deviation), *_ = form.scaling(published(family, backbone)).pairs(3)
    assert form.bands == bands
    found = ((0 - mean) / deviation, (255 - mean) / deviation)
    assert found == pytest.approx(black_white, abs=1e-3)


def test_a_new_band_sees_the_mean_and_grey_stays_grey(terravox: Command, weights: Path) -> None:
    """Four bands would answer a grey image otherwise than three, or a known band be moved."""
    bands = "blue,green,red,nir"
    four = imported(terravox, weights, "vainf", "--bands", bands)
    assert four.input.bands == tuple(bands.split(","))
    assert four.input.scaling.mean == pytest.approx((103.53, 116.28, 123.675, 114.495))
    after = four.network().backbone.conv1.weight  # type: ignore[union-attr]
    before = torch.load(weights)["model_state"]["backbone.conv1.weight"]
    assert torch.allclose(after[:, 0], before[:, 2] * 0.75)
    assert torch.allclose(after[:, 2], before[:, 0] * 0.75)
    assert torch.allclose(after[:, 3], before.mean(1) * 0.75)
    assert torch.allclose(after.sum(1), before.sum(1), atol=1e-6)


def test_a_trunk_alone_is_given_a_fresh_head_and_the_bundle_says_so(
    terravox: Command, tmp_path: Path
) -> None:
    """A head of random weights would pass for a trained one, or the trunk be lost."""
    theirs = shaken(resnet18()).state_dict()
    for layout in ("torchvision", "timm"):
        torch.save(theirs, tmp_path / "resnet18.pth")
        bundle = imported(
            terravox, tmp_path / "resnet18.pth", layout, "--family", "v3plus", "--classes", 3
        )
        found = bundle.network().backbone.state_dict()  # type: ignore[union-attr]
        assert {k: w for k, w in theirs.items() if not k.startswith("fc.")}.keys() == found.keys()
        assert all(torch.equal(theirs[key], weight) for key, weight in found.items())
        assert bundle.architecture == published("v3plus", "resnet18")
        assert bundle.training["imported"]["fresh"] == "the head: train it before use"
        assert len(bundle.classes) == 3
        terravox("model", "import", tmp_path / "resnet18.pth", "--layout", layout, "-o",
                 tmp_path / "none").refuses("trunk alone", "--classes")  # fmt: skip
        terravox("model", "import", tmp_path / "resnet18.pth", "--layout", layout, "-o",
                 tmp_path / "none", "--classes", 1).refuses("at least two")  # fmt: skip
        assert not (tmp_path / "none").exists()


def test_a_trunk_for_volumes_is_known_by_its_published_names(
    terravox: Command, tmp_path: Path
) -> None:
    """MedicalNet's files could not be read: every name begins with ``module.`` there."""
    with torch.device("meta"):
        trunk = build_network(published("v3", "medicalnet10", dims=3), bands=1, classes=2).backbone
    shapes = {f"module.{key}": part for key, part in trunk.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.rand(part.shape, generator=generator).to(part.dtype)
        for key, part in shapes.items()
    }
    assert state["module.conv1.weight"].shape == (64, 1, 7, 7, 7)
    assert state["module.layer4.0.downsample.0.weight"].shape == (512, 256, 1, 1, 1)
    torch.save({"state_dict": state}, tmp_path / "resnet_10_23dataset.pth")
    bundle = imported(
        terravox, tmp_path / "resnet_10_23dataset.pth", "medicalnet", "--classes", 3,
        "--bands", "t1,t2", "--crop", 64, "--slice-stride", 2, "--slice-ratio", 5,
    )  # fmt: skip
    asked = published("v3", "medicalnet10", dims=3)
    assert bundle.architecture == replace(asked, slice_stride=2, slice_ratio=5.0)
    assert (bundle.input.dtype, bundle.input.bands) == ("float32", ("t1", "t2"))
    assert bundle.crop == (64, 64, 64)
    found = bundle.network().backbone.state_dict()  # type: ignore[union-attr]
    first = found.pop("conv1.weight")
    assert torch.equal(first, state["module.conv1.weight"].repeat(1, 2, 1, 1, 1) / 2)
    assert all(torch.equal(state[f"module.{key}"], part) for key, part in found.items())


def test_one_score_becomes_two_classes(terravox: Command, tmp_path: Path) -> None:
    """A network with one score, a sigmoid's, would be one class everywhere."""
    torch.manual_seed(0)
    network = shaken(build_network(SMP, bands=3, classes=1))
    like = {"decoder.aspp.0.convs.0.0.weight": torch.zeros(())}
    torch.save(abroad(LAYOUTS["smp"], network, like=like), tmp_path / "binary.pth")
    bundle = imported(terravox, tmp_path / "binary.pth", "smp")
    assert bundle.architecture == SMP
    image_BCS = torch.randn(1, 3, 65, 65).double()
    with torch.inference_mode():
        score_BKS = network.double()(image_BCS, Frame((0, 0), (65, 65)))
        want_BKS = torch.cat([1 - score_BKS.sigmoid(), score_BKS.sigmoid()], dim=1)
    assert score_BKS.std() > 0
    assert (logits(bundle, image_BCS).softmax(1) - want_BKS).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["DeepLabV3", "DeepLabV3Plus"])
def test_segmentation_models_weights_give_its_logits(
    terravox: Command, tmp_path: Path, name: str
) -> None:
    """Its weights would run with other rates, dilations or a decoder of another order."""
    smp = pytest.importorskip(
        "segmentation_models_pytorch", reason="the extra 'baselines' is not installed"
    )
    torch.manual_seed(1)
    theirs = shaken(getattr(smp, name)("resnet18", encoder_weights=None, classes=5))
    torch.save(theirs.state_dict(), tmp_path / "smp.pth")
    bundle = imported(terravox, tmp_path / "smp.pth", "smp")
    side = 97 if name == "DeepLabV3Plus" else 65
    # Its own quadruples the size, and so moves the corners that it says it aligns.
    theirs.decoder.up = nn.Upsample(size=(25, 25), mode="bilinear", align_corners=True)
    image_BCS = torch.randn(1, 3, side, side).double()
    with torch.inference_mode():
        features = theirs.double().encoder(image_BCS)
        want_BKS = theirs.segmentation_head[0](theirs.decoder(features))
        network = bundle.network().pool_over(None).double()
        got_BKS = network.coarse_logits(image_BCS, Frame((0, 0), (side, side)))
    assert (got_BKS - want_BKS).abs().max() < 1e-9 * want_BKS.std()


CLASSES = "classes: [{id: 0, name: sea, color: '#0000ff'}, {id: 7, name: land, color: '#00ff00'}]"


def test_what_the_file_does_not_say_is_asked(terravox: Command, weights: Path) -> None:
    """Stride, rates and crop are in no file of weights, and change every label."""
    plain = imported(terravox, weights, "vainf")
    assert (plain.architecture, plain.crop) == (VAINF, (513, 513))
    assert [info.name for info in plain.classes] == [f"class-{n}" for n in range(5)]
    fine = imported(terravox, weights, "vainf", "--output-stride", 8, "--crop", 321)
    assert fine.architecture == VAINF.at_stride(8)
    assert fine.crop == (321, 321)
    own = imported(terravox, weights, "vainf", "--rates", "4,8,12")
    assert own.architecture == replace(VAINF, rates=(4, 8, 12))


def test_what_contradicts_the_file_is_refused(terravox: Command, weights: Path) -> None:
    """``--classes`` would rename what the network never learnt, or a v3 run as a v3+."""
    legend = weights.parent / "classes.yaml"
    legend.write_text(CLASSES)
    run = ("model", "import", weights, "--layout", "vainf", "-o", weights.parent / "none")
    terravox(*run, "--classes", legend).refuses("gives 2 classes", "has 5")
    terravox(*run, "--classes", 4).refuses("gives 4 classes", "has 5")
    terravox(*run, "--family", "v3plus").refuses("--family v3plus asked, the file holds a v3")
    terravox(*run, "--rates", "6,x").refuses("--rates 6,x: whole numbers")
    terravox(*run, "--bands", "red,red").refuses("band names must differ")
    terravox(*run, "--bands", "red,,blue").refuses("--bands red,,blue", "none of them empty")
    terravox(*run, "--crop", 0).refuses("crop [0, 0] must be")
    terravox(*run, "--weights", "V1").refuses("a file of weights, or --weights")
    terravox("model", "import", "--layout", "vainf", "-o", weights).refuses("a file of weights, or")
    terravox(*run[:4], "jfzhang", *run[5:]).refuses("the file has no aspp.conv1.weight")
    assert not (weights.parent / "none").exists()


def test_classes_are_named_by_who_knows_them(terravox: Command, tmp_path: Path) -> None:
    """A mask would say class-3 for what the user has named, or the file has."""
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    (tmp_path / "classes.yaml").write_text(CLASSES)
    bundle = imported(
        terravox, tmp_path / "resnet18.pth", "timm", "--classes", tmp_path / "classes.yaml"
    )
    assert [(c.id, c.name, c.color) for c in bundle.classes] == [
        (0, "sea", "#0000ff"), (7, "land", "#00ff00"),
    ]  # fmt: skip
    mmseg, rows = (
        LAYOUTS["mmseg"],
        {"classes": ("wall", "sky"), "palette": [[1, 2, 3], [255, 0, 9]]},
    )
    for meta in ({"dataset_meta": rows}, {key.upper(): value for key, value in rows.items()}):
        said = mmseg.classes({"meta": meta})
        assert said is not None
        assert [(c.name, c.color) for c in said] == [("wall", "#010203"), ("sky", "#ff0009")]
    assert mmseg.classes({"meta": {"epoch": 3}}) is None


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (
            ("torchvision", "--backbone", "resnet50", "--weights", "COCO_WITH_VOC_LABELS_V1"),
            "deeplabv3_resnet50_coco-cd0a2569.pth",
        ),
        (("torchvision", "--backbone", "resnet18", "--weights", "IMAGENET1K_V1"),
         "resnet18-f37072fd.pth"),
        (("timm", "--weights", "xception65.tf_in1k"), "xception65.tf_in1k.safetensors"),
    ],
)  # fmt: skip
def test_without_a_network_the_file_to_bring_is_named(
    terravox: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    file: str,
) -> None:
    """The user would be told of a socket, not of a file."""

    def fail(url: str, *_: object, **__: object) -> None:
        assert url.startswith("https://")
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    answer = terravox("model", "import", "--layout", *words, "-o", tmp_path / "none")
    answer.refuses("cannot fetch https://", "no route to host", f"terravox model import {file}")
    assert not (tmp_path / "none").exists()


def test_weights_that_are_fetched_are_checked_and_kept(
    terravox: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be fetched for every import, or be taken as they come."""
    fetched = []

    def download(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        fetched.append((url.rpartition("/")[2], hash_prefix))
        torch.save(resnet18().state_dict(), path)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    words = (
        "--layout",
        "torchvision",
        "--weights",
        "IMAGENET1K_V1",
        "--classes",
        "2",
        "--backbone",
    )
    for _ in range(2):
        terravox("model", "import", *words, "resnet18", "-o", tmp_path / "bundle")
        assert load_bundle(tmp_path / "bundle").training["imported"]["file"] == fetched[0][0]
    assert fetched == [("resnet18-f37072fd.pth", "f37072fd")]
    run = ("model", "import", "-o", tmp_path / "none", *words)
    terravox(*run, "resnet34").refuses("--backbone resnet34", "mobilenetv3-large")
    terravox(*run, "resnet50", "--weights", "V9").refuses("V9", "COCO_WITH_VOC_LABELS_V1")
    terravox(*run, "resnet18", "--layout", "smp").refuses("of smp, give a file")
