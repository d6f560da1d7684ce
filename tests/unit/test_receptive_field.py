from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from pipeline.domain import Halo, Region
from pipeline.errors import BundleError
from pipeline.models.architecture import Architecture
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.frame import Frame
from pipeline.models.nan_probe import probe_network
from pipeline.models.receptive_field import local_halo, reach_of, receptive_field
from pipeline.models.stages import stages_of


def network_of(
    backbone: str, dims: int, stride: int, rates: tuple[int, ...], *, pooling: bool = False
) -> DeepLab:
    architecture = Architecture(
        family="v3",
        backbone=backbone,
        dims=dims,
        output_stride=stride,
        rates=rates,
        image_pooling=pooling,
    )
    return build_network(architecture, bands=1, classes=2).eval()


@pytest.mark.parametrize(
    ("backbone", "radius", "before", "after"),
    [("resnet50", 509, 520, 512), ("resnet101", 781, 792, 784)],
)
def test_deep_networks_at_stride_8_reach_as_far_as_published(
    backbone: str, radius: int, before: int, after: int
) -> None:
    """Published figures (radius + 8 before and + 1 after an aligned core) would not be met."""
    network = network_of(backbone, 2, 8, (12, 24, 36))
    chain = stages_of(network)
    assert receptive_field(chain) == Region((-radius,) * 2, (radius + 1,) * 2)
    assert local_halo(chain) == Halo((radius + 8,) * 2, (radius + 1,) * 2)
    assert reach_of(network).halo == Halo((before,) * 2, (after,) * 2)


@pytest.mark.parametrize(
    ("backbone", "dims", "stride", "rates", "limit"),
    [
        ("slim", 2, 4, (2, 4, 6), 64),
        ("slim", 2, 8, (1, 2), 64),
        ("slim", 3, 2, (2, 4, 6), 32),
        ("slim", 3, 4, (1, 2), 32),
    ],
)
def test_slim_networks_keep_their_promised_halo(
    backbone: str, dims: int, stride: int, rates: tuple[int, ...], limit: int
) -> None:
    """Tiles of a small machine would be mostly halo, or the network too large for it."""
    network = network_of(backbone, dims, stride, rates)
    assert reach_of(network).halo.largest <= limit
    assert sum(weight.numel() for weight in network.parameters()) <= 1_000_000


@pytest.mark.parametrize(
    ("network", "length"),
    [
        (network_of("slim", 2, 4, (2, 4, 6)), 256),
        (network_of("slim", 2, 8, (1, 2)), 256),
        (network_of("slim", 3, 2, (1, 3)), 112),
        (network_of("resnet18", 2, 8, (2, 5)), 640),
        (network_of("resnet18", 2, 16, (1, 2)), 640),
    ],
    ids=["slim", "slim-8", "slim-3d", "resnet18", "resnet18-16"],
)
def test_a_nan_reaches_exactly_as_far_as_the_halo_says(network: DeepLab, length: int) -> None:
    """The arithmetic would be wrong for a layer; a NaN shows what depends on it by itself."""
    dims, stride = network.architecture.dims, network.architecture.output_stride
    needed = local_halo(stages_of(network))
    core = range(length // 2 // stride * stride, length // 2 // stride * stride + 2 * stride)
    axis = dims + 1
    touched = set()
    for place in range(core[0] - needed.before[-1] - 2, core[-1] + needed.after[-1] + 3):
        if core[0] - needed.before[-1] + 2 < place < core[-1] + needed.after[-1] - 2:
            continue  # inside; only the ends are in question
        image_BCS = torch.zeros(1, 1, *(stride * 2,) * (dims - 1), length)
        image_BCS[..., place] = math.nan
        with torch.inference_mode():
            logits_BKS = network(image_BCS, Frame((0,) * dims, tuple(image_BCS.shape[2:])))
        if logits_BKS.narrow(axis, core[0], len(core)).isnan().any():
            touched.add(place)
    assert min(touched) == core[0] - needed.before[-1]
    assert max(touched) == core[-1] + needed.after[-1]


def test_a_pooled_network_reads_its_window_and_no_more() -> None:
    """A tile would miss part of the mean, or read the whole scene for nothing."""
    network = network_of("slim", 2, 8, (1, 2), pooling=True).pool_over((200, 200))
    reach = reach_of(network)
    assert reach.window is not None
    assert reach.window.size == (200, 200)
    for core in (Region((400, 400), (464, 464)), Region((0, 736), (64, 800))):
        read = reach.read(core, shape=(800, 800))
        assert not _has_nan(network, core, known=read)
        for axis in range(2):
            start = tuple(a + 16 * (n == axis) for n, a in enumerate(read.start))
            assert _has_nan(network, core, known=Region(start, read.stop))
    assert reach_of(network, context="tile").window is None


def _has_nan(network: DeepLab, core: Region, *, known: Region) -> bool:
    """Whether the core needs more of a scene of 800 x 800 px than what is known."""
    whole = Region.whole((800, 800))
    image_BCS = torch.full((1, 1, 800, 800), math.nan)
    image_BCS[(..., *known.slices(within=whole))] = 0.0
    with torch.inference_mode():
        logits_BKS = network(image_BCS, Frame((0, 0), (800, 800)))
    return bool(logits_BKS[(..., *core.slices(within=whole))].isnan().any())


def test_pooling_without_a_window_has_no_reach() -> None:
    """A network whose output depends on the whole scene would be tiled as if it were exact."""
    network = network_of("resnet18", 2, 8, (6, 12, 18), pooling=True)
    with pytest.raises(BundleError, match="no window"):
        reach_of(network)


def test_an_unknown_layer_is_named() -> None:
    """A layer that the arithmetic does not know would be taken for a pointwise one."""
    network = network_of("slim", 2, 4, (1,))
    network.backbone.append(nn.LPPool2d(2, 3, stride=1))
    with pytest.raises(BundleError, match=r"backbone\.9 \(LPPool2d\)"):
        reach_of(network)


class GlobalMean(nn.Module):
    """A mean that no layer names: it is called in the midst of a block."""

    def forward(self, features_BCS: Tensor) -> Tensor:
        return features_BCS + features_BCS.mean(dim=(2, 3), keepdim=True)


class ChannelMean(nn.Module):
    def forward(self, features_BCS: Tensor) -> Tensor:
        return features_BCS + features_BCS.mean(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (SqueezeExcitation(64, 8), "backbone.9 (SqueezeExcitation)"),
        (nn.GroupNorm(4, 64), "backbone.9 (GroupNorm)"),
        (nn.InstanceNorm2d(64), "backbone.9 (InstanceNorm2d)"),
        (nn.BatchNorm2d(64, track_running_stats=False), "backbone.9 (BatchNorm2d)"),
        (GlobalMean(), "backbone.9 (GlobalMean, mean)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_layer_that_mixes_the_whole_scene_is_named(layer: nn.Module, said: str) -> None:
    """Its tiles would differ at every seam, and the run be called exact."""
    network = network_of("slim", 2, 4, (1,))
    network.backbone.append(layer.eval())
    with pytest.raises(BundleError, match="mixes the whole scene") as refusal:
        reach_of(network)
    assert f"layer {said} " in str(refusal.value)
    # The NaN probe, which knows no layer, finds the same one.
    assert said.split()[0] in probe_network(network, most_px=256).layers[0]


def test_a_layer_that_mixes_channels_alone_is_not_called_global() -> None:
    """A person would be told to take out what does no harm."""
    network = network_of("slim", 2, 4, (1,))
    network.backbone.append(ChannelMean())
    with pytest.raises(BundleError, match=r"layer backbone\.9 \(ChannelMean, mean\) is not known"):
        reach_of(network)


@pytest.mark.parametrize(("backbone", "stride"), [("slim", 8), ("resnet18", 16)])
def test_the_features_that_a_scene_pools_need_the_trunk_alone(backbone: str, stride: int) -> None:
    """The first pass would read the halo of ASPP for nothing, or too little for its trunk."""
    network = network_of(backbone, 2, stride, (1, 2), pooling=True)
    reach = reach_of(network, context="scene")
    assert reach.window is None
    assert reach.pooled is not None
    assert reach.halo == reach_of(network, context="tile").halo
    side = 4 * reach.halo.largest
    core = Region((0, side // 2), (2 * stride, side // 2 + stride))
    read = core.grow(reach.pooled)
    for lacking, seen in ((0, False), (stride, True)):
        image_BCS = torch.full((1, 1, 2 * stride, side), math.nan)
        image_BCS[..., read.start[1] + lacking : read.stop[1]] = 0.0
        with torch.inference_mode():
            features_BCS = network.backbone(image_BCS)
        kept_BCS = features_BCS[..., core.start[1] // stride : core.stop[1] // stride]
        assert bool(kept_BCS.isnan().any()) is seen
