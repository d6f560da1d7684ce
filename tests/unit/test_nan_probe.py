"""The probe against reaches known by hand, by gradient, and by interval arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import Command
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3_resnet50
from torchvision.ops import SqueezeExcitation

from pipeline.domain import Halo, Region
from pipeline.errors import BundleError
from pipeline.models.architecture import Architecture
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.geometry import Slide
from pipeline.models.nan_probe import Probe, probe, probe_halves, probe_network, touched
from pipeline.models.receptive_field import local_halo, reach_of
from pipeline.models.stages import stages_of


class Lambda(nn.Module):
    """A layer without parts."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Branches(nn.Module):
    """Branches side by side, joined over channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.branches]
        return torch.cat([part.expand(-1, -1, *x.shape[2:]) for part in parts], dim=1)


class Attention(nn.Module):
    """Every place asks every other; along x alone where ``axial``."""

    def __init__(self, *, axial: bool = False) -> None:
        super().__init__()
        self.axial = axial
        self.ask = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(height if self.axial else 1, -1, channels)
        rows = self.ask(rows, rows, rows, need_weights=False)[0]
        return rows.reshape(1, height, width, channels).permute(0, 3, 1, 2)


def seen(
    module: Callable[[Tensor], Tensor], *, stride: int = 1, dims: int = 2, **more: int
) -> Probe:
    if isinstance(module, nn.Module):
        module.eval()
    return probe(module, **({"bands": 4, "most_px": 64} | more), dims=dims, stride=stride)


@pytest.mark.parametrize(
    ("module", "stride", "before", "after"),
    [
        (nn.Conv2d(4, 2, 1), 1, (0, 0), (0, 0)),
        (nn.Conv2d(4, 2, 3, padding=5, dilation=5), 1, (5, 5), (5, 5)),
        (nn.Conv2d(4, 2, 3, stride=2, padding=1), 2, (1, 1), (0, 0)),
        (nn.Conv2d(4, 2, 1, stride=4), 4, (0, 0), (0, 0)),
        (nn.Sequential(nn.ZeroPad2d((4, 0, 1, 2)), nn.Conv2d(4, 2, (4, 5))), 1, (1, 4), (2, 0)),
        (nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(4, 2, 7)), 1, (3, 3), (3, 3)),
        (nn.MaxPool2d(3, stride=1, padding=1), 1, (1, 1), (1, 1)),
        (nn.MaxPool2d(3, stride=2, ceil_mode=True), 2, (0, 0), (1, 1)),
        (nn.AvgPool2d(5, stride=1, padding=2), 1, (2, 2), (2, 2)),
        (nn.Sequential(nn.MaxPool2d(2), nn.Upsample(scale_factor=2)), 2, (0, 0), (0, 0)),
        (
            nn.Sequential(nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear")),
            2,
            (2, 2),
            (2, 2),
        ),
        (
            nn.Sequential(
                nn.Conv2d(4, 4, 3, stride=2, padding=1),
                nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1),
            ),
            2,
            (3, 3),
            (2, 2),
        ),
        (
            Branches(nn.Conv2d(4, 2, 3, padding=1), nn.Conv2d(4, 2, (1, 9), padding=(0, 4))),
            1,
            (1, 4),
            (1, 4),
        ),
        (nn.Conv3d(4, 2, (1, 3, 5), padding=(0, 1, 2)), 1, (0, 1, 2), (0, 1, 2)),
        (nn.MaxPool3d(3, stride=1, padding=1), 1, (1, 1, 1), (1, 1, 1)),
    ],
)
def test_the_reach_of_a_layer_is_found_to_the_pixel(
    module: nn.Module, stride: int, before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    """A phase, a side or an axis would be taken for another, or a pool would swallow the NaN."""
    found = seen(module, stride=stride, dims=len(before))
    assert (found.before, found.after, found.layers) == (before, after, ())
    assert found.halo == Halo(before, after)
    halves = probe_halves(module, dims=len(before), bands=4, stride=stride, most_px=64)
    assert halves.halo == found.halo.round_up(stride)


@pytest.mark.parametrize("seed", range(6))
def test_gradients_flow_back_exactly_as_far_as_nan_flows_forth(seed: int) -> None:
    """Both the strips and the arithmetic of phases could be wrong in the same way."""
    random = torch.Generator().manual_seed(seed)

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=random))

    layers: list[nn.Module] = []
    for step in (2, 1, 2, 1):
        kernel, dilation = draw(2, 4), draw(1, 3)
        total = dilation * (kernel - 1) + 1 - step
        left = draw(0, total) if total > 0 else 0
        pads = (left, total - left) * 2
        layers += [nn.ZeroPad2d(pads), nn.Conv2d(1, 1, kernel, stride=step, dilation=dilation)]
    layers.append(nn.Upsample(scale_factor=4, mode="bilinear"))
    module = nn.Sequential(*layers).eval()
    for weight in module.parameters():
        nn.init.constant_(weight, 1.0)
    image_BCS = torch.ones(1, 1, 160, 160, requires_grad=True)
    module(image_BCS)[0, 0, 80:84, 80:84].sum().backward()
    assert image_BCS.grad is not None
    needed = image_BCS.grad[0, 0].nonzero()
    low, high = needed.amin(0), needed.amax(0)
    found = seen(module, stride=4, bands=1, most_px=160)
    assert found.before == tuple((80 - low).clamp(min=0).tolist())
    assert found.after == tuple((high - 83).clamp(min=0).tolist())


@pytest.mark.parametrize(
    ("module", "layers"),
    [
        (Branches(nn.Conv2d(4, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1)), ("branches.1",)),
        (
            nn.Sequential(
                SqueezeExcitation(4, 2), nn.Conv2d(4, 4, 3, padding=1), SqueezeExcitation(4, 2)
            ),
            ("0.avgpool", "2.avgpool"),
        ),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4), nn.Conv2d(4, 1, 1)), ("1",)),
        (nn.GroupNorm(2, 4), ("GroupNorm",)),
        (nn.Sequential(nn.Conv2d(4, 4, 1), Attention()), ("1.ask",)),
        (Lambda(lambda x: x - x.mean(dim=(2, 3), keepdim=True)), ("Lambda",)),
        (Lambda(lambda x: x.cumsum(3).cumsum(2)), ()),
    ],
)
def test_a_global_network_is_told_and_its_layers_are_named(
    module: nn.Module, layers: tuple[str, ...]
) -> None:
    """It would be tiled with seams, or a local neighbour of the culprit would be blamed."""
    found = seen(module)
    assert found.halo is None
    assert (found.before, found.after) == ((None, None), (None, None))
    assert found.layers == layers


def test_a_network_is_global_on_some_axes_alone() -> None:
    """Rows of a scene could not be tiled though nothing connects them."""
    found = seen(Attention(axial=True))
    assert (found.before, found.after) == ((0, None), (0, None))
    assert found.layers == ("ask",)


@pytest.mark.parametrize(
    ("backbone", "dims", "stride", "rates"),
    [
        ("slim", 2, 4, (2, 4, 6)),
        ("slim", 2, 8, (1, 2)),
        ("slim", 3, 2, (2, 4)),
        ("slim", 3, 4, (1, 2)),
        ("resnet18", 2, 8, (1, 2)),
        ("resnet18", 2, 16, (1, 2)),
        ("resnet50", 2, 8, (1, 3)),
        ("resnet101", 2, 8, (1, 2)),
    ],
)
def test_the_probe_and_the_arithmetic_agree_on_our_networks(
    backbone: str, dims: int, stride: int, rates: tuple[int, ...]
) -> None:
    """A halo would be too short for a layer, or a stride of work wasted on each side."""
    network = ours(backbone, dims, stride, rates)
    interval = local_halo(stages_of(network))
    found = probe_network(network, most_px=2 * interval.largest + 16 * stride).halo
    assert found is not None
    assert found | interval == interval
    assert found.round_up(stride) == reach_of(network).halo
    assert not network._forward_pre_hooks


@pytest.mark.parametrize(
    ("backbone", "dims", "stride", "crop"),
    [
        ("slim", 2, 4, (200, 264)),
        ("slim", 3, 2, (48, 40, 56)),
        ("resnet18", 2, 8, (264, 256)),
    ],
)
def test_pooling_over_windows_is_local_and_pooling_over_all_is_not(
    backbone: str, dims: int, stride: int, crop: tuple[int, ...]
) -> None:
    """The halo that is printed would be too short for the window, or pooling thought harmless."""
    network = ours(backbone, dims, stride, (1, 2), pooling=True).pool_over(crop)
    stated = reach_of(network).halo_with_window
    most_px = 2 * stated.largest + max(crop) + 16 * stride
    found = probe_network(network, most_px=most_px).halo
    assert found is not None
    assert found.round_up(stride) == stated
    endless = probe_network(network.pool_over(None), most_px=most_px)
    assert endless.halo is None
    assert endless.layers == ("classifier.0.convs.3.0",)


class Published(nn.Module):
    """torchvision's ResNet-50 DeepLabV3 as a person would bring it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = deeplabv3_resnet50(weights=None, weights_backbone=None)

    def forward(self, image_BCS: Tensor) -> Tensor:
        return self.network(image_BCS)["out"]


def test_the_published_resnet50_reaches_as_far_as_measured_elsewhere_and_pools_over_all() -> None:
    """Figures found by others for somebody else's code would not come out of our probe."""
    module = Published().eval()
    found = probe(module, dims=2, bands=3, stride=8, most_px=1536)
    assert found.halo is None
    assert found.layers == ("network.classifier.0.convs.4.0",)
    aspp = module.network.classifier[0]
    aspp.convs[4] = Lambda(lambda x: x.new_zeros(1, 256, *x.shape[2:]))
    span = touched(module, torch.zeros(1, 3, 64, 1536), axis=1, place=768)
    assert (768 - span.start, span.stop - 1 - 768) == (508, 515)


def test_convolutions_are_plain_while_probing_and_as_before_afterwards() -> None:
    """Other algorithms smear NaN over their blocks; the rest of the process wants them back."""
    flags = []

    def look(x: Tensor) -> Tensor:
        backends = torch.backends
        nnpack = backends.nnpack.set_flags(True)[0]
        backends.nnpack.set_flags(nnpack)
        flags.append((backends.mkldnn.enabled, backends.cudnn.enabled, nnpack))
        return x

    look(torch.zeros(1))
    seen(Lambda(look))
    assert set(flags[1:]) == {(False, False, False)}
    look(torch.zeros(1))
    assert flags[-1] == flags[0]


class Masked(nn.Module):
    """A convolution beside one whose NaN is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Conv2d(4, 1, 1), nn.Conv2d(4, 1, 9, padding=4)
        self.mask = Lambda(torch.nan_to_num)

    def forward(self, x: Tensor) -> Tensor:
        return self.near(x) + self.mask(self.far(x))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Masked(), r"layer mask and never comes out"),
        (torch.nan_to_num, r"no output turns NaN"),
        (nn.Conv2d(4, 1, 3), r"output of \(62, 14\), not of the same size"),
        (nn.Conv2d(4, 1, 3, stride=2, padding=1), r"moved by the output stride of 1 px"),
        (lambda x: {"out": x}, r"one tensor of 4 axes, found .*dict"),
        (nn.ReflectionPad2d(20), r"does not take a strip of \(64, 16\) px"),
        (nn.Conv2d(3, 1, 1), r"does not take a strip of .* 3 channels"),
        (lambda x: (x - x) / (x - x), r"gives NaN for an input that has none"),
    ],
)
def test_a_network_that_cannot_be_probed_is_refused(
    module: Callable[[Tensor], Tensor], words: str
) -> None:
    """A reach too short would be believed."""
    with pytest.raises(BundleError, match=words):
        seen(module, most_px=64)


def test_training_mode_and_short_strips_are_refused() -> None:
    """NaN would enter the statistics of the network for good, or a strip have no middle."""
    module = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(BundleError, match="training mode"):
        probe(module, dims=2, bands=4, stride=1, most_px=64)
    with pytest.raises(BundleError, match="strips of 30 px are too short"):
        seen(module, stride=8, most_px=30)


def test_probing_leaves_a_network_as_it_was() -> None:
    """Hooks would stay, or NaN in a buffer, in the network that is to run."""
    module = Branches(nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)).eval()
    image_BCS = torch.rand(1, 4, 32, 32)
    before = module(image_BCS)
    seen(module)
    assert torch.equal(module(image_BCS), before)
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], slim: Path
) -> Command:
    return Command(monkeypatch, capsys, slim)


def test_the_command_prints_both_reaches_the_verdict_and_the_halo(
    command: Command, slim3d: Path
) -> None:
    """Nobody could see whether a bundle may be tiled."""
    answer = command("model", "probe", slim3d, "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out) == {
        "output_stride": 2,
        "interval_before": [31, 31, 31],
        "interval_after": [30, 30, 30],
        "probe_before": [31, 31, 31],
        "probe_after": [30, 30, 30],
        "verdict": "LOCAL",
        "layers_at_fault": [],
        "halo_before": [32, 32, 32],
        "halo_after": [30, 30, 30],
    }
    rows = dict(
        line.split(maxsplit=1) for line in command("model", "probe", slim3d).out.splitlines()
    )
    assert rows["probe_before"] == "31 31 31"
    assert rows["layers_at_fault"] == "none"


def test_the_command_fails_with_one_line_where_the_arithmetic_says_too_little(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong rule for a layer would give masks with seams, and nobody would know."""
    reads = Slide.reads

    def forgetful(slide: Slide, region: Region) -> Region:
        return region if slide.dilation == (6, 6) else reads(slide, region)

    monkeypatch.setattr(Slide, "reads", forgetful)
    answer = command("model", "probe", command.model, "--json")
    answer.refuses("(63, 63)", "(55, 55)", "halo is too short", code=1)
    assert json.loads(answer.out)["probe_before"] == [63, 63]


def test_the_command_fails_for_a_bundle_whose_network_is_global(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer that makes seams would not be named."""
    forward = nn.BatchNorm2d.forward

    def per_tile(self: nn.BatchNorm2d, x: Tensor) -> Tensor:
        return forward(self, x) - x.mean(dim=(2, 3), keepdim=True)

    monkeypatch.setattr(nn.BatchNorm2d, "forward", per_tile)
    answer = command("model", "probe", command.model, "--json")
    answer.refuses("GLOBAL", "backbone.1", "do not tile", code=1)
    assert json.loads(answer.out)["verdict"] == "GLOBAL"


def ours(
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
