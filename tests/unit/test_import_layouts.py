from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, deeplabv3_resnet50

from pipeline.errors import BundleError
from pipeline.models.architecture import Architecture, Decoder
from pipeline.models.deeplab import DecoderHead, DeepLab, Head, build_network
from pipeline.models.frame import Frame
from pipeline.models.layouts.layout import bring
from pipeline.models.layouts.registry import LAYOUTS, layout_named
from pipeline.models.published import published
from tests.foreign_weights import abroad

VAINF = published("v3", "resnet50", output_stride=16)
SMP = replace(
    published("v3", "resnet50"), align_corners=True, dilate_first=True, smoothing=True, width=256
)
NETWORKS: dict[str, tuple[str, Architecture, str]] = {
    "torchvision": ("torchvision", published("v3", "resnet50"), "backbone.x"),
    "torchvision mobilenet": ("torchvision", published("v3", "mobilenetv3-large"), "backbone.x"),
    "kazuto": ("kazuto", replace(published("v2", "resnet101"), multi_scale="inputs"), ""),
    "kazuto at one scale": ("kazuto", published("v2", "resnet101"), ""),
    "vainf v3": ("vainf", VAINF, ""),
    "vainf v3plus": (
        "vainf",
        replace(VAINF, family="v3plus", decoder=Decoder(low=48, widths=(256,))),
        "",
    ),
    "jfzhang": (
        "jfzhang",
        replace(
            published("v3plus", "resnet101", output_stride=16),
            align_corners=True,
            dilate_first=True,
            multi_grid=(1, 2, 4),
        ),
        "",
    ),
    "smp v3": ("smp", SMP, ""),
    "smp v3 of its first releases": ("smp", SMP, "decoder.0.convs.0.0.weight"),
    "smp v3plus": (
        "smp",
        replace(
            SMP,
            family="v3plus",
            output_stride=16,
            separable="bare",
            decoder=Decoder(low=48, widths=(256,)),
        ),
        "decoder.aspp.0.convs.0.0.weight",
    ),
    "mmseg v3": (
        "mmseg",
        replace(published("v3", "resnet50c"), smoothing=False),
        "",
    ),
    "mmseg v3plus": (
        "mmseg",
        replace(published("v3plus", "resnet101c"), smoothing=False),
        "",
    ),
    "tf xception": ("tf", published("v3plus", "xception65", output_stride=16), ""),
    "tf xception without decoder": ("tf", published("v3", "xception71", output_stride=16), ""),
    "tf beta": ("tf", published("v3", "resnet101-beta", output_stride=16), ""),
    "tf resnet": (
        "tf",
        replace(published("v3", "resnet50-tf", output_stride=16), image_pooling=False),
        "",
    ),
}

NAMES: dict[str, dict[str, tuple[int, ...]]] = {
    "torchvision": {
        "backbone.conv1.weight": (64, 3, 7, 7),
        "backbone.layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "backbone.layer4.2.bn3.running_var": (2048,),
        "classifier.0.convs.0.0.weight": (256, 2048, 1, 1),
        "classifier.0.convs.3.0.weight": (256, 2048, 3, 3),
        "classifier.0.convs.4.1.weight": (256, 2048, 1, 1),
        "classifier.0.project.0.weight": (256, 1280, 1, 1),
        "classifier.1.weight": (256, 256, 3, 3),
        "classifier.2.bias": (256,),
        "classifier.4.weight": (21, 256, 1, 1),
        "classifier.4.bias": (21,),
    },
    "torchvision mobilenet": {
        "backbone.0.0.weight": (16, 3, 3, 3),
        "backbone.4.block.2.fc1.weight": (24, 72, 1, 1),
        "backbone.16.1.running_mean": (960,),
        "classifier.0.convs.0.0.weight": (256, 960, 1, 1),
    },
    "kazuto": {
        "base.layer1.conv1.conv.weight": (64, 3, 7, 7),
        "base.layer1.conv1.bn.running_mean": (64,),
        "base.layer2.block1.reduce.conv.weight": (64, 64, 1, 1),
        "base.layer2.block1.conv3x3.conv.weight": (64, 64, 3, 3),
        "base.layer2.block1.increase.bn.weight": (256,),
        "base.layer2.block1.shortcut.conv.weight": (256, 64, 1, 1),
        "base.layer4.block23.increase.conv.weight": (1024, 256, 1, 1),
        "base.layer5.block3.conv3x3.bn.bias": (512,),
        "base.layer5.block1.shortcut.bn.running_var": (2048,),
        "base.aspp.c0.weight": (21, 2048, 3, 3),
        "base.aspp.c3.bias": (21,),
    },
    "kazuto at one scale": {
        "layer1.conv1.conv.weight": (64, 3, 7, 7),
        "aspp.c3.bias": (21,),
    },
    "vainf v3": {
        "backbone.layer4.0.downsample.1.weight": (2048,),
        "classifier.classifier.0.convs.1.0.weight": (256, 2048, 3, 3),
        "classifier.classifier.0.project.1.weight": (256,),
        "classifier.classifier.1.weight": (256, 256, 3, 3),
        "classifier.classifier.4.bias": (21,),
    },
    "vainf v3plus": {
        "classifier.project.0.weight": (48, 256, 1, 1),
        "classifier.project.1.bias": (48,),
        "classifier.aspp.convs.4.2.weight": (256,),
        "classifier.aspp.project.0.weight": (256, 1280, 1, 1),
        "classifier.classifier.0.weight": (256, 304, 3, 3),
        "classifier.classifier.1.weight": (256,),
        "classifier.classifier.3.weight": (21, 256, 1, 1),
    },
    "jfzhang": {
        "backbone.layer3.22.conv3.weight": (1024, 256, 1, 1),
        "aspp.aspp1.atrous_conv.weight": (256, 2048, 1, 1),
        "aspp.aspp4.atrous_conv.weight": (256, 2048, 3, 3),
        "aspp.aspp4.bn.running_mean": (256,),
        "aspp.global_avg_pool.1.weight": (256, 2048, 1, 1),
        "aspp.global_avg_pool.2.bias": (256,),
        "aspp.conv1.weight": (256, 1280, 1, 1),
        "aspp.bn1.weight": (256,),
        "decoder.conv1.weight": (48, 256, 1, 1),
        "decoder.bn1.weight": (48,),
        "decoder.last_conv.0.weight": (256, 304, 3, 3),
        "decoder.last_conv.1.weight": (256,),
        "decoder.last_conv.4.weight": (256, 256, 3, 3),
        "decoder.last_conv.5.running_var": (256,),
        "decoder.last_conv.8.weight": (21, 256, 1, 1),
    },
    "smp v3": {
        "encoder.conv1.weight": (64, 3, 7, 7),
        "decoder.aspp.convs.0.0.weight": (256, 2048, 1, 1),
        "decoder.aspp.convs.4.2.running_var": (256,),
        "decoder.aspp.project.0.weight": (256, 1280, 1, 1),
        "decoder.conv.weight": (256, 256, 3, 3),
        "decoder.bn.weight": (256,),
        "segmentation_head.0.weight": (21, 256, 1, 1),
    },
    "smp v3 of its first releases": {
        "decoder.0.convs.0.0.weight": (256, 2048, 1, 1),
        "decoder.1.weight": (256, 256, 3, 3),
        "decoder.2.weight": (256,),
    },
    "smp v3plus": {
        "decoder.aspp.0.convs.0.0.weight": (256, 2048, 1, 1),
        "decoder.aspp.0.convs.1.0.0.weight": (2048, 1, 3, 3),
        "decoder.aspp.0.convs.1.0.1.weight": (256, 2048, 1, 1),
        "decoder.aspp.0.convs.1.1.running_mean": (256,),
        "decoder.aspp.0.project.1.bias": (256,),
        "decoder.aspp.1.0.weight": (256, 1, 3, 3),
        "decoder.aspp.1.1.weight": (256, 256, 1, 1),
        "decoder.aspp.2.weight": (256,),
        "decoder.block1.0.weight": (48, 256, 1, 1),
        "decoder.block1.1.weight": (48,),
        "decoder.block2.0.0.weight": (304, 1, 3, 3),
        "decoder.block2.0.1.weight": (256, 304, 1, 1),
        "decoder.block2.1.weight": (256,),
        "segmentation_head.0.bias": (21,),
    },
    "mmseg v3": {
        "backbone.stem.0.weight": (32, 3, 3, 3),
        "backbone.stem.1.weight": (32,),
        "backbone.stem.3.weight": (32, 32, 3, 3),
        "backbone.stem.4.weight": (32,),
        "backbone.stem.6.weight": (64, 32, 3, 3),
        "backbone.stem.7.running_mean": (64,),
        "backbone.layer1.0.conv1.weight": (64, 64, 1, 1),
        "decode_head.image_pool.1.conv.weight": (512, 2048, 1, 1),
        "decode_head.image_pool.1.bn.weight": (512,),
        "decode_head.aspp_modules.0.conv.weight": (512, 2048, 1, 1),
        "decode_head.aspp_modules.3.conv.weight": (512, 2048, 3, 3),
        "decode_head.aspp_modules.3.bn.bias": (512,),
        "decode_head.bottleneck.conv.weight": (512, 2560, 3, 3),
        "decode_head.bottleneck.bn.weight": (512,),
        "decode_head.conv_seg.weight": (21, 512, 1, 1),
        "decode_head.conv_seg.bias": (21,),
    },
    "mmseg v3plus": {
        "decode_head.aspp_modules.0.conv.weight": (512, 2048, 1, 1),
        "decode_head.aspp_modules.1.depthwise_conv.conv.weight": (2048, 1, 3, 3),
        "decode_head.aspp_modules.1.depthwise_conv.bn.weight": (2048,),
        "decode_head.aspp_modules.3.pointwise_conv.conv.weight": (512, 2048, 1, 1),
        "decode_head.aspp_modules.3.pointwise_conv.bn.weight": (512,),
        "decode_head.c1_bottleneck.conv.weight": (48, 256, 1, 1),
        "decode_head.c1_bottleneck.bn.weight": (48,),
        "decode_head.sep_bottleneck.0.depthwise_conv.conv.weight": (560, 1, 3, 3),
        "decode_head.sep_bottleneck.0.pointwise_conv.conv.weight": (512, 560, 1, 1),
        "decode_head.sep_bottleneck.1.pointwise_conv.bn.running_var": (512,),
    },
    "tf xception": {
        "xception_65/entry_flow/conv1_1/weights": (3, 3, 3, 32),
        "xception_65/entry_flow/conv1_2/BatchNorm/moving_variance": (64,),
        "xception_65/entry_flow/block1/unit_1/xception_module/shortcut/weights": (1, 1, 64, 128),
        "xception_65/entry_flow/block2/unit_1/xception_module/separable_conv2_pointwise/"
        "BatchNorm/gamma": (256,),
        "xception_65/middle_flow/block1/unit_16/xception_module/separable_conv3_depthwise/"
        "depthwise_weights": (3, 3, 728, 1),
        "xception_65/exit_flow/block1/unit_1/xception_module/separable_conv2_pointwise/weights": (
            1, 1, 728, 1024,
        ),
        "xception_65/exit_flow/block2/unit_1/xception_module/separable_conv3_pointwise/"
        "BatchNorm/beta": (2048,),
        "image_pooling/weights": (1, 1, 2048, 256),
        "aspp0/BatchNorm/moving_mean": (256,),
        "aspp1_depthwise/depthwise_weights": (3, 3, 2048, 1),
        "aspp3_pointwise/BatchNorm/gamma": (256,),
        "concat_projection/weights": (1, 1, 1280, 256),
        "decoder/feature_projection0/weights": (1, 1, 256, 48),
        "decoder/decoder_conv0_depthwise/depthwise_weights": (3, 3, 304, 1),
        "decoder/decoder_conv1_pointwise/weights": (1, 1, 256, 256),
        "logits/semantic/weights": (1, 1, 256, 21),
        "logits/semantic/biases": (21,),
    },
    "tf xception without decoder": {
        "xception_71/entry_flow/block5/unit_1/xception_module/shortcut/BatchNorm/beta": (728,),
        "logits/semantic/weights": (1, 1, 256, 21),
    },
    "tf beta": {
        "resnet_v1_101/conv1_1/weights": (3, 3, 3, 64),
        "resnet_v1_101/conv1_3/weights": (3, 3, 64, 128),
        "resnet_v1_101/conv1_3/BatchNorm/gamma": (128,),
        "resnet_v1_101/block1/unit_1/bottleneck_v1/shortcut/weights": (1, 1, 128, 256),
        "resnet_v1_101/block3/unit_23/bottleneck_v1/conv2/weights": (3, 3, 256, 256),
        "aspp1/weights": (3, 3, 2048, 256),
    },
    "tf resnet": {
        "resnet_v1_50/conv1/weights": (7, 7, 3, 64),
        "resnet_v1_50/block4/unit_3/bottleneck_v1/conv3/BatchNorm/moving_mean": (2048,),
        "concat_projection/weights": (1, 1, 1024, 256),
    },
}  # fmt: skip


def on_paper(architecture: Architecture) -> DeepLab:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build_network(architecture, bands=3, classes=21)


def foreign(name: str) -> dict[str, Tensor]:
    """Names and shapes of a network abroad."""
    layout, architecture, hint = NETWORKS[name]
    return abroad(layout_named(layout), on_paper(architecture), like={hint: torch.zeros(())})


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_have_the_names_and_shapes_of_their_authors(name: str) -> None:
    """No published file could be read: the map would agree with itself alone."""
    found = {key: tuple(weight.shape) for key, weight in foreign(name).items()}
    known = NAMES[name]
    assert {key: found.get(key) for key in known} == known


@pytest.mark.parametrize(
    ("name", "count"),
    [("torchvision", 370 - 8), ("torchvision mobilenet", 360 - 8), ("kazuto", 632)],
)
def test_a_file_has_as_many_tensors_as_the_published_one(name: str, count: int) -> None:
    """A layer would be without weights; torchvision's auxiliary classifier has eight."""
    assert len(foreign(name)) == count


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_known_by_its_weights(name: str) -> None:
    """Weights would run in another network: trunk, head, width, decoder or rates."""
    layout, architecture, _ = NETWORKS[name]
    found = layout_named(layout).architecture(foreign(name))
    bare = replace(found, smoothing=architecture.smoothing, width=architecture.width)
    assert bare == architecture
    assert found.smooth == architecture.smooth


def random(network: DeepLab, *, trunk: bool) -> DeepLab:
    """The network, every weight of its head drawn, and of its trunk or not."""
    generator = torch.Generator().manual_seed(0)
    for name, part in network.named_children():
        if name == "backbone" and not trunk:
            continue
        part.to_empty(device="cpu")
        for weight in part.state_dict().values():
            if weight.is_floating_point():
                weight.uniform_(0.1, 1, generator=generator)
            else:
                weight.fill_(7)
    return network


SMALLER = {"resnet50": "resnet18", "resnet101c": "resnet50c", "xception65": "xception41"}


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_come_back_from_abroad_as_they_were(name: str) -> None:
    """Two weights would change places, or axes their order."""
    layout, architecture, hint = NETWORKS[name]
    smaller = SMALLER.get(architecture.backbone, architecture.backbone)
    architecture = replace(architecture, backbone=smaller)
    network = random(on_paper(architecture), trunk=name in ("kazuto", "vainf v3", "tf xception"))
    state = abroad(layout_named(layout), network, like={hint: torch.zeros(())})
    back = bring(layout_named(layout), state, network=network, architecture=architecture)
    want = network.state_dict()
    if layout == "tf":  # which does not count batches
        want = {k: 0 * w if k.endswith("batches_tracked") else w for k, w in want.items()}
    assert back.keys() == want.keys()
    for key, weight in want.items():
        assert back[key].shape == weight.shape
        assert weight.is_meta or torch.equal(back[key], weight), key


def normed(values: Tensor, norm: str, state: Mapping[str, Tensor]) -> Tensor:
    mean, var, weight, bias = (
        state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return F.relu(F.batch_norm(values, mean, var, weight, bias, eps=1e-5))


def brought(name: str) -> tuple[DeepLab, dict[str, Tensor]]:
    """A network whose head's weights come from abroad, and what they were there."""
    layout, architecture, _ = NETWORKS[name]
    form, sketch = layout_named(layout), on_paper(architecture)
    generator = torch.Generator().manual_seed(4)
    state = {}
    for key, weight in abroad(form, sketch, like={}).items():
        if key.startswith(("backbone.", "xception")):
            state[key] = weight
        elif weight.is_floating_point():  # drawn by their names, whatever the layout says of them
            drawn = torch.rand(weight.shape, generator=generator)
            state[key] = drawn - (0.5 if weight.ndim == 4 else 0)
    weights = bring(form, state, network=sketch, architecture=architecture)
    sketch.load_state_dict(weights, assign=True)
    return sketch.eval(), state


def test_the_image_pool_comes_first_in_mmseg() -> None:
    """Every channel of the projection would be taken for another branch's."""
    network, state = brought("mmseg v3")
    features_BCS = torch.rand(1, 2048, 5, 6, generator=torch.Generator().manual_seed(1))

    def conv(values: Tensor, name: str, rate: int = 1) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        padding = rate * (weight.shape[-1] // 2)
        return normed(F.conv2d(values, weight, padding=padding, dilation=rate), f"{name}.bn", state)

    with torch.inference_mode():
        pooled = conv(features_BCS.mean((2, 3), keepdim=True), "decode_head.image_pool.1")
        parts = [pooled.expand(-1, -1, 5, 6)]
        for number, rate in enumerate((1, 12, 24, 36)):
            parts.append(conv(features_BCS, f"decode_head.aspp_modules.{number}", rate))
        joined = conv(torch.cat(parts, dim=1), "decode_head.bottleneck")
        want_BKS = F.conv2d(
            joined, state["decode_head.conv_seg.weight"], state["decode_head.conv_seg.bias"]
        )
        assert isinstance(network.classifier, Head)
        got_BKS = network.classifier(features_BCS, Frame((0, 0), (40, 48)))
    assert want_BKS.std() > 0
    assert (got_BKS - want_BKS).abs().max() < 1e-5 * want_BKS.std()


def test_low_level_features_come_first_in_vainfs_decoder() -> None:
    """The decoder would take the encoder's channels for edges."""
    network, state = brought("vainf v3plus")
    encoded, low = torch.rand(1, 256, 5, 6), torch.rand(1, 48, 5, 6)
    with torch.inference_mode():
        joined = torch.cat([low, encoded], dim=1)
        fused = F.conv2d(joined, state["classifier.classifier.0.weight"], padding=1)
        want_BCS = normed(fused, "classifier.classifier.1", state)
        assert isinstance(network.classifier, DecoderHead)
        got_BCS = network.classifier.fuse(torch.cat([encoded, low], dim=1))
    assert want_BCS.std() > 0
    assert (got_BCS - want_BCS).abs().max() < 1e-5 * want_BCS.std()


def test_tensorflows_kernels_turn_and_its_image_pool_comes_first() -> None:
    """Axes of equal length would change places unseen: kernels are (y, x, in, out) there."""
    network, state = brought("tf xception without decoder")
    features_BCS = torch.rand(1, 2048, 5, 6, generator=torch.Generator().manual_seed(1))

    def norm(values: Tensor, name: str) -> Tensor:
        names = {
            "weight": "gamma", "bias": "beta", "running_mean": "moving_mean",
            "running_var": "moving_variance",
        }  # fmt: skip
        parts = {f".{o}": state[f"{name}/BatchNorm/{t}"] for o, t in names.items()}
        return normed(values, "", parts)

    def pointwise(values: Tensor, name: str) -> Tensor:
        return norm(torch.einsum("bcyx,ijck->bkyx", values, state[f"{name}/weights"]), name)

    def depthwise(values: Tensor, name: str, rate: int) -> Tensor:
        kernel, padded = state[f"{name}/depthwise_weights"], F.pad(values, (rate,) * 4)
        total = torch.zeros_like(values)
        for y in range(3):
            for x in range(3):
                part = padded[:, :, y * rate : y * rate + 5, x * rate : x * rate + 6]
                total += part * kernel[y, x, :, 0, None, None]
        return norm(total, name)

    with torch.inference_mode():
        pooled = pointwise(features_BCS.mean((2, 3), keepdim=True), "image_pooling")
        parts = [pooled.expand(-1, -1, 5, 6), pointwise(features_BCS, "aspp0")]
        for number, rate in enumerate((6, 12, 18), start=1):
            mixed = depthwise(features_BCS, f"aspp{number}_depthwise", rate)
            parts.append(pointwise(mixed, f"aspp{number}_pointwise"))
        joined = pointwise(torch.cat(parts, dim=1), "concat_projection")
        kernel, bias = state["logits/semantic/weights"], state["logits/semantic/biases"]
        want_BKS = torch.einsum("bcyx,ijck->bkyx", joined, kernel) + bias[:, None, None]
        assert isinstance(network.classifier, Head)
        got_BKS = network.classifier(features_BCS, Frame((0, 0), (65, 81)))
    assert want_BKS.std() > 0
    assert (got_BKS - want_BKS).abs().max() < 1e-4 * want_BKS.std()


@pytest.mark.parametrize("make", [deeplabv3_resnet50, deeplabv3_mobilenet_v3_large])
def test_torchvisions_auxiliary_classifier_is_left_out(make) -> None:
    """Published files hold one, and would be refused for it."""
    with torch.device("meta"):
        theirs = make(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    form, state = LAYOUTS["torchvision"], theirs.state_dict()
    architecture = form.architecture(state)
    found = bring(form, state, network=on_paper(architecture), architecture=architecture)
    assert found.keys() == {key for key in state if not key.startswith("aux_classifier.")}


def test_missing_unknown_and_unlike_weights_are_named() -> None:
    """Half a network would be imported, its rest left at whatever it was."""
    form, architecture = LAYOUTS["jfzhang"], NETWORKS["jfzhang"][1]
    state, network = foreign("jfzhang"), on_paper(architecture)
    for change, message in (
        ({"aspp.bn1.bias": None}, r"misses weights of v3plus on resnet101: aspp\.bn1\.bias$"),
        ({"extra.weight": torch.zeros(1)}, r"has unknown weights .*: extra\.weight$"),
        ({"aspp.bn1.bias": torch.zeros(3)}, r"aspp\.bn1\.bias is \[3\], not \[256\]"),
        (dict.fromkeys(k for k in state if ".layer4." in k), "and 46 more$"),
    ):
        changed = {k: w for k, w in (state | change).items() if w is not None}
        with pytest.raises(BundleError, match=message):
            bring(form, changed, network=network, architecture=architecture)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_of_another_layout_is_refused(layout: str) -> None:
    """A traceback would say a KeyError, not what the file holds."""
    with pytest.raises(BundleError, match=r"something\.else"):
        layout_named(layout).architecture({"something.else.weight": torch.zeros(1)})
    with pytest.raises(BundleError, match="there are: torchvision, kazuto"):
        layout_named("nobody")
