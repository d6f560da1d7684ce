from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision.models import resnet, resnet18
from torchvision.models.segmentation import (
    deeplabv3_mobilenet_v3_large,
    deeplabv3_resnet50,
    deeplabv3_resnet101,
)

from pipeline.errors import BundleError, RegionError
from pipeline.models import residual
from pipeline.models.architecture import Architecture
from pipeline.models.context_pool import WindowMean
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.frame import Frame
from pipeline.models.fresh import spread


def architecture_of(**changes: object) -> Architecture:
    values: dict[str, object] = {
        "family": "v3",
        "backbone": "resnet50",
        "dims": 2,
        "output_stride": 8,
        "rates": (12, 24, 36),
        "image_pooling": True,
    }
    return Architecture(**(values | changes))  # type: ignore[arg-type]


def shake(network: nn.Module, *, seed: int) -> None:
    """Batch norms with statistics of their own."""
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 2.0, generator=generator)
            layer.weight.data.uniform_(0.5, 1.5, generator=generator)
            layer.bias.data.normal_(0, 0.3, generator=generator)


@pytest.mark.parametrize(
    ("backbone", "stride", "published"),
    [
        ("resnet50", 8, deeplabv3_resnet50),
        ("resnet101", 8, deeplabv3_resnet101),
        ("mobilenetv3-large", 16, deeplabv3_mobilenet_v3_large),
    ],
)
def test_a_deep_network_is_torchvisions_key_for_key_and_value_for_value(
    backbone: str, stride: int, published: Callable[..., nn.Module]
) -> None:
    """Published weights would load into another network: other rates, order or upsampling."""
    theirs = published(weights=None, weights_backbone=None, num_classes=7).eval()
    shake(theirs, seed=3)
    asked = architecture_of(backbone=backbone, output_stride=stride)
    ours = build_network(asked, bands=3, classes=7).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.pool_over((513, 513))
    image_BCS = torch.randn(1, 3, 80, 112, generator=torch.Generator().manual_seed(0)).double()
    with torch.inference_mode():
        want_BKS = theirs.double()(image_BCS)["out"]
        got_BKS = ours.double()(image_BCS, Frame((0, 0), (80, 112)))
    assert (got_BKS - want_BKS).abs().max() <= 1e-9 * want_BKS.std()


@pytest.mark.parametrize("stride", [8, 16])
def test_dilated_resnet18_holds_the_features_of_the_strided_one(stride: int) -> None:
    """Weights trained at stride 32 would mean something else: a wrong rate, or a shifted grid."""
    torch.manual_seed(2)
    strided = resnet18().double().eval()
    shake(strided, seed=5)
    ours = build_network(
        architecture_of(backbone="resnet18", output_stride=stride), bands=3, classes=2
    )
    trunk = ours.backbone.double().eval()
    missing, _ = trunk.load_state_dict(strided.state_dict(), strict=False)
    assert missing == []
    image_BCS = torch.randn(1, 3, 160, 224, dtype=torch.float64)
    with torch.inference_mode():
        whole = nn.Sequential(*list(strided.children())[:-2])
        want_BCS = whole(image_BCS)
        step = 32 // stride
        got_BCS = trunk(image_BCS)[..., ::step, ::step]
    assert torch.allclose(got_BCS, want_BCS, rtol=0, atol=1e-10)


def brute_force_means(values: torch.Tensor, window: tuple[int, ...]) -> torch.Tensor:
    result = torch.empty_like(values)
    height, width = values.shape[2:]
    for y in range(height):
        for x in range(width):
            a = min(max(y - window[0] // 2, 0), max(height - window[0], 0))
            b = min(max(x - window[1] // 2, 0), max(width - window[1], 0))
            part = values[:, :, a : a + window[0], b : b + window[1]]
            result[:, :, y, x] = part.mean((2, 3))
    return result


@pytest.mark.parametrize("window", [(1, 1), (5, 3), (7, 31), (9, 13), (11, 21)])
def test_the_window_mean_is_the_mean_of_a_shifted_window(window: tuple[int, int]) -> None:
    """Windows at the border would be shortened, or a power of two summed twice."""
    layer = WindowMean(stride=8)
    layer.window = window
    values = torch.randn(2, 3, 9, 21, dtype=torch.float64)
    got = layer(values, Frame((0, 0), (72, 168)))
    assert torch.allclose(got, brute_force_means(values, window), rtol=0, atol=1e-12)


def test_the_window_mean_of_a_part_has_the_bits_of_the_whole() -> None:
    """A sum whose order depends on the tile's corner would differ in its last bits."""
    layer = WindowMean(stride=4)
    layer.window = (13, 7)
    values = torch.randn(1, 2, 60, 50)
    whole = layer(values, Frame((0, 0), (240, 200)))
    part = layer(values[:, :, 10:45, 3:40], Frame((40, 12), (240, 200)))
    assert torch.equal(part[:, :, 6:29, 3:34], whole[:, :, 16:39, 6:37])


def test_an_input_smaller_than_the_window_is_refused() -> None:
    """The mean would be taken over a shorter window without a word."""
    layer = WindowMean(stride=4)
    layer.window = (13, 13)
    with pytest.raises(RegionError, match="13 features, the input holds 10"):
        layer(torch.zeros(1, 1, 20, 10), Frame((0, 0), (160, 160)))


@pytest.mark.parametrize("stride", [2, 4])
def test_a_volume_is_not_processed_slice_by_slice(stride: int) -> None:
    """Slices would not know of one another: no third dimension in the convolutions."""
    network = _network_3d(stride)
    volume_BCS = torch.randn(1, 1, 24, 16, 16)
    other_BCS = volume_BCS.clone()
    other_BCS[:, :, 12] += 0.5
    frame = Frame((0, 0, 0), (24, 16, 16))
    with torch.inference_mode():
        change_S = (network(volume_BCS, frame) - network(other_BCS, frame)).abs().amax((0, 1))
    for z in (11, 13):
        assert change_S[z].max() > 1e-3


def _network_3d(stride: int) -> DeepLab:
    torch.manual_seed(0)
    slim = architecture_of(
        backbone="slim", dims=3, output_stride=stride, rates=(1, 2), image_pooling=False
    )
    network = build_network(slim, bands=1, classes=3)
    spread(network)
    return network


def test_pooling_trains_as_torchvision_does() -> None:
    """Batch norm of the pooling branch would learn the statistics of features, not of means."""
    theirs = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=4)
    ours = build_network(architecture_of(), bands=3, classes=4)
    ours.load_state_dict(theirs.state_dict())
    image_BCS = torch.randn(2, 3, 64, 64)
    for network in (theirs, ours):
        network.train()
        for layer in network.modules():
            if isinstance(layer, nn.Dropout):
                layer.eval()
    want_BKS = theirs(image_BCS)["out"]
    got_BKS = ours(image_BCS, Frame((0, 0), (64, 64)))
    assert torch.allclose(got_BKS, want_BKS, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "v4"}, "family 'v4' asked; there is: v1, v2, v3, v3plus"),
        ({"backbone": "vgg"}, "no 2-D backbone 'vgg'"),
        ({"dims": 3}, "no 3-D backbone 'resnet50'"),
        ({"output_stride": 4}, "output stride 4 asked of resnet50"),
        ({"rates": ()}, "rates must be positive"),
    ],
)
def test_an_architecture_that_does_not_exist_is_refused(
    changes: dict[str, object], message: str
) -> None:
    """A typing error in a bundle would surface as a traceback from deep inside torch."""
    with pytest.raises(BundleError, match=message):
        architecture_of(**changes)


@pytest.mark.parametrize("name", ["BasicUnit", "Bottleneck"])
def test_parts_of_a_residual_unit_come_in_torchvisions_order(name: str) -> None:
    """``model new`` draws weights in this order: a seed would name another network."""
    shortcut = nn.Conv2d(8, 16, 1)
    ours = getattr(residual, name)(8, 16 // getattr(residual, name).expansion, downsample=shortcut)
    theirs = getattr(resnet, name.replace("Unit", "Block"))(
        8, 16 // ours.expansion, downsample=shortcut
    )
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
