from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.domain import Halo, Region
from pipeline.errors import BundleError
from pipeline.inference.staged import StagedNetwork
from pipeline.models.architecture import Architecture, Decoder
from pipeline.models.bundle import load_bundle
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.document import from_document, to_document
from pipeline.models.frame import Frame
from pipeline.models.published import published
from pipeline.models.receptive_field import reach_of, receptive_field
from pipeline.models.stages import stages_of
from pipeline.models.xception import XCEPTIONS, XceptionTrunk
from tests.golden.outside_networks import figures, fill, image
from workflows.model import create

PAPER = published("v3", "resnet50-tf", output_stride=16)
CASCADE = replace(PAPER, rates=(), image_pooling=False, cascade=3)
SMP = replace(published("v3", "resnet50"), dilate_first=True, align_corners=True)
SMP_PLUS = replace(
    SMP,
    family="v3plus",
    output_stride=16,
    separable="bare",
    smoothing=True,
    decoder=Decoder(low=48, widths=(256,)),
)
VAINF = published("v3", "resnet50", output_stride=16)
VAINF_PLUS = replace(VAINF, family="v3plus", decoder=Decoder(low=48, widths=(256,)))
JFZHANG = replace(
    published("v3plus", "resnet101", output_stride=16),
    align_corners=True,
    dilate_first=True,
    multi_grid=(1, 2, 4),
)


def on_paper(architecture: Architecture, *, classes: int = 21) -> DeepLab:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build_network(architecture, bands=3, classes=classes).eval()


@pytest.mark.parametrize(
    ("architecture", "parameters"),
    [
        (published("v3", "resnet50"), 39_638_869),
        (published("v3", "resnet101"), 58_630_997),
        (published("v3", "mobilenetv3-large"), 11_025_477),
        (SMP_PLUS, 26_678_613 + 16 * 257),
    ],
    ids=["torchvision r50", "torchvision r101", "torchvision mobilenet", "smp v3plus r50"],
)
def test_a_network_has_as_many_parameters_as_published(
    architecture: Architecture, parameters: int
) -> None:
    """A layer would be missing or twice there; figures without auxiliary classifier."""
    network = on_paper(architecture)
    assert sum(weight.numel() for weight in network.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "millions"), [("xception41", 26.97), ("xception65", 39.92), ("xception71", 42.34)]
)
def test_an_xception_has_as_many_parameters_as_published(name: str, millions: float) -> None:
    """A unit would be missing; timm's figures hold a classifier of 1000 classes."""
    trunk = on_paper(published("v3", name)).backbone
    count = sum(weight.numel() for weight in trunk.parameters()) + 2048 * 1000 + 1000
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize(("name", "stride"), [("xception41", 8), ("xception71", 32)])
def test_an_xception_of_given_weights_is_the_one_from_outside(name: str, stride: int) -> None:
    """Released weights would mean something else: another order, rate, ReLU or shortcut."""
    with torch.device("meta"):
        trunk = XceptionTrunk(XCEPTIONS[name], bands=3, output_stride=stride, multi_grid=())
    with torch.inference_mode():
        _same_figures(fill(trunk)(image(33)), name)


@pytest.mark.parametrize(
    ("name", "architecture", "side"), [("smp v3", SMP, 64), ("smp v3plus", SMP_PLUS, 97)]
)
def test_a_network_of_given_weights_is_the_one_from_outside(
    name: str, architecture: Architecture, side: int
) -> None:
    """Weights of segmentation_models_pytorch would run in another head, decoder or dilation."""
    network = fill(on_paper(architecture, classes=5))
    with torch.inference_mode():
        coarse_BKS = network.coarse_logits(image(side), Frame((0, 0), (side, side)))
    _same_figures(coarse_BKS, name)


def _same_figures(found_BCS: Tensor, name: str) -> None:
    path = Path(__file__).parents[1] / "golden" / "outside_networks.json"
    want: dict[str, Any] = json.loads(path.read_text())[name]
    found = figures(found_BCS)
    near = 1e-6 * want["deviation"]
    assert found["shape"] == want["shape"]
    for key in ("mean", "deviation", "some"):
        assert found[key] == pytest.approx(want[key], rel=0, abs=near), key


@pytest.mark.parametrize(
    "architecture",
    [
        replace(PAPER, image_pooling=False),
        replace(CASCADE, cascade=2, multi_grid=(1, 2, 1)),
        replace(published("v3", "xception41", output_stride=16), image_pooling=False),
    ],
    ids=["resnet, multi-grid", "cascade", "xception"],
)
def test_logits_at_stride_8_hold_those_at_stride_16(architecture: Architecture) -> None:
    """The same weights would mean something else at stride 8: a rate that is not doubled.

    The release of the authors tests its trunks so (testAtrousFullyConvolutionalValues).
    """
    coarse = fill(on_paper(architecture))
    fine = on_paper(architecture.at_stride(8))
    fine.load_state_dict(coarse.state_dict(), assign=True)
    with torch.inference_mode():
        want_BKS = coarse.coarse_logits(image(65), Frame((0, 0), (65, 65)))
        got_BKS = fine.coarse_logits(image(65), Frame((0, 0), (65, 65)))[..., ::2, ::2]
    assert want_BKS.shape == (1, 21, 5, 5)
    assert torch.allclose(got_BKS, want_BKS, rtol=0, atol=1e-10 * float(want_BKS.std(-1).max()))
    assert want_BKS.std(-1).min() > 0


def test_a_cascade_doubles_its_rates_from_block_to_block() -> None:
    """Blocks 5 to 7 would look no further than block 4: Fig. 3 (b), rates 2, 4, 8 and 16."""
    assert _rates(CASCADE) == [[2 * n * f for f in (1, 2, 4)] for n in (1, 2, 4, 8)]
    assert _rates(CASCADE.at_stride(8)) == [[4 * n * f for f in (1, 2, 4)] for n in (1, 2, 4, 8)]


def _rates(architecture: Architecture) -> list[list[int]]:
    """Dilations of the 3x3 convolutions of block 4 and those that follow it."""
    trunk = on_paper(architecture).backbone
    blocks = [trunk.get_submodule(f"layer{n}") for n in range(4, 5 + architecture.cascade)]
    return [[unit.conv2.dilation[0] for unit in block] for block in blocks]  # type: ignore[union-attr, index, misc]


def test_strides_lie_in_the_last_unit_of_the_authors_trunks() -> None:
    """Released weights would look at other places: torchvision strides in the first unit."""
    for name, at in (("resnet50-tf", -1), ("resnet50-beta", -1), ("resnet50", 0)):
        trunk = on_paper(published("v3", name, output_stride=16)).backbone
        for number, halves in ((1, at == -1), (2, True), (3, at == 0), (4, False)):
            strides = [unit.conv2.stride[0] for unit in trunk.get_submodule(f"layer{number}")]  # type: ignore[union-attr, index, misc]
            assert strides.pop(at) == (2 if halves else 1), (name, number)
            assert set(strides) == {1}, (name, number)


@pytest.mark.parametrize(("stride", "sides"), [(32, (41, 21, 11)), (16, (41, 21)), (8, (41,))])
def test_an_xception_has_the_sizes_of_its_authors_tests(
    stride: int, sides: tuple[int, ...]
) -> None:
    """A place of the features would not be one of the image: 321 -> 161, 81, 41, 21 and 11."""
    with torch.device("meta"):
        trunk = XceptionTrunk(XCEPTIONS["xception65"], bands=3, output_stride=stride, multi_grid=())
        features_BCS = trunk.stem(torch.zeros(1, 3, 321, 321))
        found = [features_BCS.shape[-1]]
        for block in trunk.blocks:
            features_BCS = block(features_BCS)
            found.append(features_BCS.shape[-1])
    assert tuple(dict.fromkeys(found)) == (161, 81, *sides)


@pytest.mark.parametrize(
    ("backbone", "side", "low", "encoded"),
    [("xception65", 513, 129, 33), ("resnet101-beta", 513, 129, 33), ("resnet50", 512, 128, 32)],
)
def test_a_decoder_works_at_stride_4(backbone: str, side: int, low: int, encoded: int) -> None:
    """Encoder and low-level features would lie beside one another, or not fit at all."""
    network = on_paper(published("v3plus", backbone, output_stride=16))
    frame = Frame((0, 0), (side, side))
    with torch.device("meta"):
        image_BCS = torch.zeros(1, 3, side, side)
        low_BCS, features_BCS = network.backbone.taps(image_BCS)
        coarse_BKS = network.coarse_logits(image_BCS, frame)
        logits_BKS = network(image_BCS, frame)
    assert low_BCS.shape == (1, 256, low, low)
    assert features_BCS.shape == (1, 2048, encoded, encoded)
    assert coarse_BKS.shape == (1, 21, low, low)
    assert logits_BKS.shape == (1, 21, side, side)


@pytest.mark.parametrize(
    ("architecture", "before", "after"),
    [
        (PAPER, 657, 657),
        (published("v3", "resnet101-tf", output_stride=16), 929, 929),
        (published("v3", "resnet101-tf", output_stride=8), 929, 929),
        (published("v3", "resnet50-beta", output_stride=16), 659, 659),
        (VAINF, 517, 517),
        (published("v3", "resnet101", output_stride=16), 789, 789),
        (published("v3", "resnet50c"), 511, 511),
        (published("v3", "resnet101c"), 783, 783),
        (SMP, 533, 533),
        (published("v3", "xception65", output_stride=16), 1245, 1245),
        (published("v3", "mobilenetv3-large"), 921, 921),
        (published("v3plus", "resnet101-tf", output_stride=16), 945, 945),
        (published("v3plus", "xception65", output_stride=16), 1261, 1261),
        (published("v3plus", "xception71", output_stride=16), 1297, 1297),
        (JFZHANG, 933, 933),
        (VAINF_PLUS, 517, 501),
        (replace(VAINF_PLUS, backbone="resnet101"), 789, 773),
    ],
)
def test_a_logit_sees_as_far_as_published(
    architecture: Architecture, before: int, after: int
) -> None:
    """A kernel, rate or stride would be another: figures of receptive fields, layer by layer."""
    field = receptive_field(stages_of(on_paper(replace(architecture, image_pooling=False))))
    assert (field.start, field.stop) == ((-before,) * 2, (after + 1,) * 2)


@pytest.mark.parametrize(
    ("architecture", "halo"),
    [
        (published("v3", "resnet50"), 520),
        (published("v3", "resnet101"), 792),
        (VAINF, 544),
        (published("v3", "resnet101", output_stride=16), 816),
        (published("v3", "resnet50c"), 520),
        (published("v3", "resnet101c"), 792),
        (VAINF_PLUS, 528),
        (replace(VAINF_PLUS, backbone="resnet101"), 800),
        (PAPER, 672),
        (published("v3", "resnet101-tf", output_stride=16), 944),
        (published("v3", "resnet101-tf", output_stride=8), 936),
        (published("v3", "xception65", output_stride=16), 1248),
        (published("v3plus", "resnet101-tf", output_stride=16), 960),
        (published("v3plus", "xception65", output_stride=16), 1264),
        (published("v3plus", "xception71", output_stride=16), 1312),
        (JFZHANG, 944),
    ],
)
def test_an_aligned_tile_needs_the_published_halo(architecture: Architecture, halo: int) -> None:
    """Upsampling would reach further than its neighbours, or corners be aligned otherwise."""
    reach = reach_of(on_paper(replace(architecture, image_pooling=False)))
    assert reach.halo.largest == halo


def test_squeeze_and_excitation_is_refused_by_name_where_tiles_must_agree() -> None:
    """Tiles would differ at every seam, and the run be called exact."""
    network = on_paper(published("v3", "mobilenetv3-large")).pool_over((513, 513))
    with pytest.raises(BundleError, match=r"backbone\.4\.block\.2 \(SqueezeExcitation\) mixes"):
        reach_of(network)
    with pytest.raises(BundleError, match="mixes the whole scene"):
        reach_of(network, context="scene")
    assert reach_of(network, context="tile").halo == Halo((944, 944), (928, 928))


def test_squeeze_and_excitation_in_stages_is_that_of_one_pass() -> None:
    """A tile's means would be a window's, or its factors not those of the layer."""
    network = fill(on_paper(published("v3", "mobilenetv3-large"), classes=3))
    frame, coarse = Frame((0, 0), (96, 128)), Region((1, 2), (4, 7))
    image_BCS = torch.cat([image(96), image(96)[..., :32]], dim=3)
    with torch.inference_mode():
        want_BKS = network.coarse_logits(image_BCS, frame)[..., 1:4, 2:7]
        staged = StagedNetwork(stages_of(network), window=2)
        got_BKS = staged.coarse_logits(image_BCS, frame, coarse)
    assert torch.allclose(got_BKS, want_BKS, rtol=0, atol=1e-9 * float(want_BKS.std()))


@pytest.mark.parametrize(
    "architecture",
    [PAPER, CASCADE, SMP, SMP_PLUS, VAINF_PLUS, JFZHANG, published("v3plus", "resnet50c")],
)
def test_every_published_variant_survives_a_bundle(architecture: Architecture) -> None:
    """A field would be lost on the way to disk, and the weights run in another network."""
    document = json.loads(json.dumps(to_document(architecture)))
    assert from_document(Architecture, document) == architecture


def test_a_bundle_of_before_keeps_its_digest() -> None:
    """Fields that came later would be written at their defaults, and runs be done again."""
    keys = ["family", "backbone", "dims", "output_stride", "rates", "image_pooling"]
    assert list(to_document(published("v3", "resnet50"))) == keys


@pytest.mark.parametrize(
    ("family", "backbone"),
    [("v3plus", "slim"), ("v3plus", "xception41"), ("v3", "mobilenetv3-large")],
)
def test_a_fresh_bundle_has_all_classes(tmp_path: Path, family: str, backbone: str) -> None:
    """Benchmarks and trials would show one class everywhere."""
    create(
        output=tmp_path / "model",
        family=family,
        backbone=backbone,
        dims=2,
        bands=4,
        classes=3,
        output_stride=None,
        seed=0,
    )
    network = load_bundle(tmp_path / "model").network().pool_over(None)
    side = 160 + network.align_corners
    noise_BCS = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        labels = network(noise_BCS, Frame((0, 0), (side, side))).argmax(1)
    assert labels.shape == (1, side, side)
    assert torch.bincount(labels.flatten(), minlength=3).min() > 0.02 * side * side


def test_a_bundle_goes_to_another_stride_with_its_rates(tmp_path: Path) -> None:
    """Weights trained at stride 16 could not be run at 8, as the papers evaluate them."""
    create(
        output=tmp_path / "model", family="v3", backbone="resnet18", dims=2, bands=3, classes=2,
        output_stride=16, seed=0,
    )  # fmt: skip
    bundle = load_bundle(tmp_path / "model")
    finer = bundle.at_stride(8)
    assert (bundle.architecture.rates, finer.architecture.rates) == ((6, 12, 18), (12, 24, 36))
    assert finer.digest != bundle.digest
    weights = finer.network().state_dict()
    assert all(torch.equal(w, weights[k]) for k, w in bundle.network().state_dict().items())


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (PAPER, {"decoder": Decoder(low=48, widths=(256,))}, "family v3 has no decoder"),
        (PAPER, {"family": "v3plus"}, "v3plus needs a decoder"),
        (SMP_PLUS, {"cascade": 1}, "cascade 1 is of family v3"),
        (PAPER, {"cascade": 3}, "in place of ASPP"),
        (SMP, {"cascade": 3, "rates": (), "image_pooling": False}, "trunks -tf and -beta alone"),
        (PAPER, {"multi_grid": (1, 2)}, "takes 3 positive factors"),
        (VAINF, {"backbone": "resnet18", "multi_grid": (1, 2, 4)}, "takes 2 positive factors"),
        (PAPER, {"projection": 2}, "kernel 1 or 3"),
        (PAPER, {"backbone": "mobilenetv3-large", "output_stride": 8}, "it has 16"),
    ],
)
def test_a_network_that_cannot_be_is_refused(
    base: Architecture, changes: dict[str, Any], message: str
) -> None:
    """A field would be read and not used, or fail deep inside torch."""
    with pytest.raises(BundleError, match=message):
        replace(base, **changes)


def test_odd_rates_have_no_coarser_stride() -> None:
    """Rates would be rounded, and the weights see something else."""
    with pytest.raises(BundleError, match="no whole counterparts at 16"):
        replace(published("v3", "resnet50"), rates=(3,)).at_stride(16)
    with pytest.raises(BundleError, match="other layers"):
        published("v3", "slim").at_stride(8)
