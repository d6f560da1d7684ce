from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet101, vgg16

from pipeline.domain import Halo, Region
from pipeline.errors import BundleError
from pipeline.models.architecture import Architecture
from pipeline.models.decimation import decimated
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.deeplab_v2 import DeepLabV2
from pipeline.models.frame import Frame
from pipeline.models.fresh import spread
from pipeline.models.msra import MsraTrunk
from pipeline.models.published import published
from pipeline.models.receptive_field import reach_of, receptive_field
from pipeline.models.stages import stages_of
from pipeline.models.vgg import FC_WIDTH, FcBranch, VggTrunk

LARGE_FOV = published("v1", "vgg16")
MSC_FEATURES = replace(LARGE_FOV, multi_scale="features")
VGG = published("v2", "vgg16")
RESNET = published("v2", "resnet101")
NAMES = {
    "v1": LARGE_FOV,
    "v1-msc": MSC_FEATURES,
    "v2-vgg": VGG,
    "v2-vgg-small": replace(VGG, rates=(2, 4, 8, 12)),
    "v2-vgg-msc": replace(VGG, multi_scale="inputs"),
    "v2-resnet-fov": replace(RESNET, rates=(12,)),
    "v2-resnet": RESNET,
    "v2-resnet-msc": replace(RESNET, multi_scale="inputs"),
}


def on_paper(name: str) -> DeepLab:
    """A network without memory for its weights: layers and shapes."""
    with torch.device("meta"):
        return build_network(NAMES[name], bands=3, classes=21).eval()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("v1", 20_505_429),
        # 3x3 and 1x1 layers of 128 channels on five inputs, each with its part of the classifier.
        ("v1-msc", 20_505_429 + 963 * 9 * 128 + 5 * 128 * (1 + 129 + 21) + 5 * 21),
        ("v2-vgg", 37_877_652),
        ("v2-vgg-small", 37_877_652),
        ("v2-resnet", 44_048_532),
        ("v2-resnet-msc", 44_048_532),
    ],
)
def test_a_network_has_as_many_parameters_as_published(name: str, parameters: int) -> None:
    """A layer would be missing, twice there, or of another width."""
    assert sum(weight.numel() for weight in on_paper(name).parameters()) == parameters


@pytest.mark.parametrize("name", NAMES)
def test_logits_have_the_published_sizes(name: str) -> None:
    """A pool or a stride would be rounded differently: 321 px give 41 logits and 513 give 65."""
    network, step = on_paper(name), 1 if name == "v1-msc" else 8
    for side in (321, 513):
        image_BCS = torch.zeros(1, 3, side, 321, device="meta")
        coarse_BKS = network.coarse_logits(image_BCS, Frame((0, 0), (side, 321)))
        assert coarse_BKS.shape == (1, 21, (side - 1) // step + 1, 320 // step + 1)
        assert network(image_BCS, Frame((0, 0), (side, 321))).shape == (1, 21, side, 321)


@pytest.mark.parametrize(
    ("name", "radius", "halo"),
    [
        ("v1", 217, 224),
        ("v2-vgg", 305, 312),
        ("v2-resnet-fov", 609, 616),
        ("v2-resnet", 705, 712),
    ],
)
def test_a_network_reaches_as_far_as_published(name: str, radius: int, halo: int) -> None:
    """A kernel, rate or pool would be another: radius of a logit, and halo of aligned tiles."""
    network = on_paper(name)
    field = Region((-radius, -radius), (radius + 1, radius + 1))
    assert receptive_field(stages_of(network)) == field
    reach = reach_of(network)
    assert (reach.halo, reach.endpoint) == (Halo((halo, halo), (halo, halo)), 1)


def test_the_smallest_scale_reaches_twice_as_far() -> None:
    """The image at scale 1/2 would be taken for the image, and tiles be read too small."""
    plain, scaled = (reach_of(on_paper(name)) for name in ("v2-vgg", "v2-vgg-msc"))
    assert (plain.stride, scaled.stride) == (8, 32)
    for far, near in zip(scaled.halo.before, plain.halo.before, strict=True):
        assert 0 <= far - 2 * near <= 32


def double(architecture: Architecture) -> DeepLab:
    torch.manual_seed(1)
    return build_network(architecture, bands=3, classes=4).double().eval()


@pytest.mark.parametrize("name", ["v1", "v1-msc", "v2-vgg-msc"])
def test_a_tile_with_its_halo_equals_the_whole(name: str) -> None:
    """Corners would be aligned to the tile's ends and not to the scene's."""
    network = double(NAMES[name])
    reach = reach_of(network)
    side, far = reach.stride + 1, reach.halo.before[1] + reach.stride
    shape = (side, far + 4 * reach.stride + 1)
    core = Region((0, far), shape)
    generator = torch.Generator().manual_seed(2)
    image_BCS = torch.randn(1, 3, *shape, dtype=torch.float64, generator=generator)
    read = reach.read(core, shape=shape)
    assert read.start[1] > 0
    with torch.inference_mode():
        whole_BKS = network(image_BCS, Frame((0, 0), shape))
        part_BCS = image_BCS[(..., *read.slices(within=Region.whole(shape)))]
        part_BKS = network(part_BCS, Frame.of(read, shape=shape))
    want_BKS = whole_BKS[(..., *core.slices(within=Region.whole(shape)))]
    got_BKS = part_BKS[(..., *core.slices(within=read))]
    assert (got_BKS - want_BKS).abs().max() <= 1e-9 * want_BKS.std()


def test_the_scales_share_one_network_and_the_greatest_score_counts() -> None:
    """Scales would have weights of their own, be resized otherwise, or be averaged."""
    network = double(NAMES["v2-vgg-msc"])
    plain = build_network(VGG, bands=3, classes=4).double().eval()
    plain.load_state_dict(network.state_dict())  # the scales hold no weights
    assert isinstance(network, DeepLabV2)
    image_BCS = torch.randn(1, 3, 33, 65, dtype=torch.float64)
    frame = Frame((0, 0), (33, 65))
    with torch.inference_mode():
        maps = network.score_maps(image_BCS, frame)
        for scores_BKS, (height, width) in zip(maps, ((33, 65), (25, 49), (17, 33)), strict=False):
            scaled_BCS = resized(image_BCS, (height, width))
            want_BKS = plain.coarse_logits(scaled_BCS, frame)
            assert torch.allclose(scores_BKS, want_BKS, rtol=0, atol=1e-9 * want_BKS.std().item())
        grown = [resized(scores_BKS, (5, 9)) for scores_BKS in maps[:3]]
        assert torch.allclose(maps[3], torch.stack(grown).amax(0), rtol=0, atol=1e-9)
        assert torch.equal(network.coarse_logits(image_BCS, frame), maps[3])
    assert len(maps) == 4


def resized(image_BCS: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(image_BCS, size=size, mode="bilinear", align_corners=True)


def test_finer_scores_are_those_of_concatenated_channels() -> None:
    """The scores of v1's MSc would not be the classifier of the paper over all channels."""
    network = double(MSC_FEATURES)
    image_BCS = torch.randn(1, 3, 17, 25, dtype=torch.float64)
    inputs: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        for layer in network.last_layers
    ]
    with torch.inference_mode():
        got_BKS = network(image_BCS, Frame((0, 0), (17, 25)))
        for hook in hooks:
            hook.remove()
        joined_BCS = torch.cat([resized(part, (17, 25)) for part in inputs], dim=1)
        first, *finer = network.last_layers
        weights = [layer.weight for layer in (first, *finer)]
        bias_K = torch.stack([layer.bias for layer in (first, *finer)]).sum(0)
        want_BKS = F.conv2d(joined_BCS, torch.cat(weights, dim=1), bias_K)
    assert joined_BCS.shape[1] == 1024 + 640
    assert torch.allclose(got_BKS, want_BKS, rtol=0, atol=1e-9)


def test_the_dilated_vgg_holds_the_features_of_the_strided_one() -> None:
    """ImageNet's weights would mean something else after pool4: a wrong rate, a shifted grid."""
    torch.manual_seed(3)
    ours = VggTrunk(bands=3).double()
    strided = vgg16(init_weights=False).features.double()
    strided.load_state_dict(ours.state_dict())  # key for key
    for layer in strided:
        if isinstance(layer, nn.MaxPool2d):
            layer.kernel_size, layer.padding = 3, 1
    image_BCS = torch.randn(1, 3, 97, 65, dtype=torch.float64)
    with torch.inference_mode():
        want_BCS = strided[:30](image_BCS)  # up to pool5, which is not dilated
        got_BCS = nn.Sequential(*list(ours)[:30])(image_BCS)
    assert got_BCS.shape[2:] == (13, 9)
    assert torch.allclose(got_BCS[..., ::2, ::2], want_BCS, rtol=0, atol=1e-10)


def test_the_dilated_resnet_holds_the_features_of_its_authors() -> None:
    """A stride in the 3x3, or a first block of another rate: released weights mean otherwise."""
    torch.manual_seed(4)
    ours = MsraTrunk(bands=3).eval()
    strided = resnet101().eval()
    strided.load_state_dict(ours.state_dict(), strict=False)
    for layer in (strided.layer2, strided.layer3, strided.layer4):
        layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    image_BCS = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        want_BCS = nn.Sequential(*list(strided.children())[:-2])(image_BCS)
        got_BCS = ours(image_BCS)
    assert got_BCS.shape[2:] == (9, 13)
    assert (got_BCS[..., ::4, ::4] - want_BCS).abs().max() <= 1e-4 * want_BCS.std()


@pytest.mark.parametrize("rate", [6, 12])
def test_a_dilated_convolution_is_a_zero_stuffed_one(rate: int) -> None:
    """fc6 would sample other places than its kernel with holes between its weights."""
    layer = FcBranch(8, 2, rate=rate).fc6.double()
    stuffed_OCS = torch.zeros(FC_WIDTH, 8, 2 * rate + 1, 2 * rate + 1, dtype=torch.float64)
    stuffed_OCS[..., ::rate, ::rate] = layer.weight.detach()
    features_BCS = torch.randn(1, 8, 15, 27, dtype=torch.float64)
    with torch.inference_mode():
        want_BCS = F.conv2d(features_BCS, stuffed_OCS, layer.bias, padding=rate)
        assert torch.allclose(layer(features_BCS), want_BCS, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["v1-msc", "v2-resnet"])
def test_a_fresh_network_finds_all_classes(name: str) -> None:
    """Tests and benchmarks would run on a flat mask: features fade without norms."""
    torch.manual_seed(0)
    network = build_network(NAMES[name], bands=3, classes=4)
    spread(network)
    noise = [torch.randn(1, 3, 129 // step, 129 // step) for step in (1, 4, 16)]
    image_BCS = torch.stack([F.interpolate(part, size=(129, 129)) for part in noise]).sum(0)
    with torch.inference_mode():
        logits_BKS = network(image_BCS, Frame((0, 0), (129, 129)))
    assert 0.2 <= logits_BKS.std() <= 20
    assert set(logits_BKS.argmax(1).unique().tolist()) == set(range(4))


def imagenet_like() -> dict[str, Tensor]:
    """Random tensors of the shapes of VGG-16."""
    with torch.device("meta"):
        shapes = {key: part.shape for key, part in vgg16(init_weights=False).state_dict().items()}
    generator = torch.Generator().manual_seed(6)
    return {key: torch.empty(shape).normal_(generator=generator) for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def imagenet() -> Mapping[str, Tensor]:
    return imagenet_like()


def test_imagenets_filters_are_decimated(imagenet: Mapping[str, Tensor]) -> None:
    """fc7 would hear of filters that fc6 lost, or rows and columns be those of another place."""
    fresh = build_network(VGG, bands=3, classes=2).state_dict()
    state = decimated(fresh, imagenet=imagenet, seed=7)
    assert {key: part.shape for key, part in state.items()} == {
        k: p.shape for k, p in fresh.items()
    }
    kept = [
        int((imagenet["classifier.0.bias"] == bias).nonzero()) for bias in state["aspp.0.fc6.bias"]
    ]
    rows = [
        int((imagenet["classifier.3.bias"] == bias).nonzero()) for bias in state["aspp.0.fc7.bias"]
    ]
    assert len(set(kept)) == len(set(rows)) == FC_WIDTH
    whole = imagenet["classifier.0.weight"][kept].reshape(FC_WIDTH, 512, 7, 7)
    for y in range(3):
        for x in range(3):
            assert torch.equal(state["aspp.2.fc6.weight"][:, :, y, x], whole[:, :, 3 * y, 3 * x])
    fc7 = imagenet["classifier.3.weight"][rows][:, kept]
    assert torch.equal(state["aspp.3.fc7.weight"][:, :, 0, 0], fc7)
    assert torch.equal(state["backbone.28.weight"], imagenet["features.28.weight"])
    assert torch.equal(state["aspp.1.fc8.weight"], fresh["aspp.1.fc8.weight"])
    again = decimated(fresh, imagenet=imagenet, seed=8)
    assert not torch.equal(again["aspp.0.fc6.bias"], state["aspp.0.fc6.bias"])


def test_weights_that_do_not_fit_are_named(imagenet: Mapping[str, Tensor]) -> None:
    """A network of four bands, or a file without fc6, would start from something half random."""
    four = build_network(LARGE_FOV, bands=4, classes=2).state_dict()
    with pytest.raises(BundleError, match=r"backbone\.0\.weight has shape \[64, 4, 3, 3\]"):
        decimated(four, imagenet=imagenet, seed=0)
    features = {key: part for key, part in imagenet.items() if key.startswith("features")}
    with pytest.raises(BundleError, match=r"no classifier\.0\.weight: .*IMAGENET1K_V1"):
        decimated(four, imagenet=features, seed=0)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (LARGE_FOV, {"backbone": "resnet101"}, "family v1 has no backbone 'resnet101'"),
        (LARGE_FOV, {"rates": (6, 12)}, "family v1 has one rate"),
        (LARGE_FOV, {"multi_scale": "inputs"}, "multi_scale of family v1 is 'features'"),
        (VGG, {"multi_scale": "features"}, "multi_scale of family v2 is 'inputs'"),
        (VGG, {"rates": ()}, "rates must be positive"),
        (RESNET, {"output_stride": 16}, "family v2 has output_stride 8 and no other, got 16"),
        (RESNET, {"align_corners": False}, "has align_corners True and no other"),
        (RESNET, {"image_pooling": True}, "has image_pooling False and no other"),
        (RESNET, {"multi_grid": (1, 2, 4)}, "family v2 has multi_grid"),
        (RESNET, {"family": "v3", "multi_scale": "inputs"}, "neither backbone vgg16 nor multi_sc"),
    ],
)
def test_what_a_family_does_not_have_is_refused(
    base: Architecture, changes: dict[str, object], message: str
) -> None:
    """A field would be read and do nothing, and its bundle be taken for another network."""
    with pytest.raises(BundleError, match=message):
        replace(base, **changes)  # type: ignore[arg-type]
