from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import vgg16
from torchvision.models.segmentation import (
    deeplabv3_mobilenet_v3_large,
    deeplabv3_resnet50,
    fcn_resnet50,
)

from pipeline.errors import BundleError
from pipeline.models.architecture import Architecture
from pipeline.models.deeplab import DecoderHead, DeepLab, Head, build_network
from pipeline.models.frame import Frame
from pipeline.models.layouts.layout import bring
from pipeline.models.layouts.registry import LAYOUTS, layout_named
from pipeline.models.published import published
from tests.foreign_names import NAMES, NETWORKS
from tests.foreign_weights import abroad


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


@pytest.mark.parametrize("make", [deeplabv3_resnet50, deeplabv3_mobilenet_v3_large, fcn_resnet50])
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
        ({"aspp.bn1.bias": None}, r"no v3plus on resnet101 .*: it misses weights aspp\.bn1\.bias$"),
        ({"extra.weight": torch.zeros(1)}, r"it has unknown weights extra\.weight$"),
        ({"aspp.bn1.bias": torch.zeros(3)}, r"aspp\.bn1\.bias is \[3\], not \[256\]"),
        (dict.fromkeys(k for k in state if ".layer4." in k), "and 46 more$"),
        ({"aspp.bn1.bias": None, "b.c": torch.zeros(1)}, r"aspp\.bn1\.bias; has unknown .* b\.c$"),
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


def test_vgg16_of_imagenet_begins_v1_and_v2() -> None:
    """fc6 and fc7, most of what VGG-16 knows, would begin at random."""
    with torch.device("meta"):
        state = vgg16(init_weights=False).state_dict()
    state |= {"classifier.0.bias": torch.arange(4096.0), "features.28.bias": torch.ones(512)}
    form = LAYOUTS["torchvision"]
    assert form.architecture(state) == published("v1", "vgg16")
    for family, fc6 in (("v1", "head.fc6"), ("v2", "aspp.3.fc6")):
        network = on_paper(published(family, "vgg16"))
        architecture = network.architecture
        trunk = bring(form, state, network=network, architecture=architecture)
        fresh = {k: w for k, w in network.state_dict().items() if not k.startswith("backbone.")}
        head = form.begun(fresh, state)
        assert trunk.keys() | head.keys() == network.state_dict().keys()
        assert torch.equal(trunk["backbone.28.bias"], torch.ones(512))
        assert len(set(head[f"{fc6}.bias"].tolist())) == 1024
