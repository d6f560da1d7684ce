"""TensorFlow's DeepLab, of the authors of v3 and v3+: its arrays by name, as an ``.npz``.

TensorFlow alone reads its checkpoints, and is not needed here. Where it is installed:

    reader = tf.train.load_checkpoint("model.ckpt")
    names = reader.get_variable_to_shape_map()
    numpy.savez("weights.npz", **{name: reader.get_tensor(name) for name in names})
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from pipeline.errors import BundleError
from pipeline.models.architecture import Architecture, Decoder
from pipeline.models.input_spec import Scaling
from pipeline.models.layouts.layout import UNIT_RANGE, Layout, some
from pipeline.models.layouts.our_names import Head
from pipeline.models.published import published
from pipeline.models.xception import XCEPTIONS

_DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
_NORM = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


class Tensorflow(Layout):
    """Trained at stride 16; the mean of the image is joined before the other branches."""

    ignored = ("global_step", "*/Momentum", "*/ExponentialMovingAverage")
    named_by_count = True

    def architecture(self, tensors: Mapping[str, Tensor]) -> Architecture:
        """As ``Layout.architecture``."""
        split = "aspp1_depthwise/depthwise_weights" in tensors
        made = replace(
            published("v3", _backbone(tensors), output_stride=16),
            image_pooling="image_pooling/weights" in tensors,
            separable="normed" if split else None,
        )
        if "decoder/feature_projection0/weights" not in tensors:
            return made
        low = tensors["decoder/feature_projection0/weights"].shape[-1]
        return replace(made, family="v3plus", decoder=Decoder(low=low, widths=(256, 256)))

    def modules(
        self, architecture: Architecture, tensors: Mapping[str, Tensor]
    ) -> Mapping[str, str]:
        """As ``Layout.modules``."""
        head, scope = Head(architecture), _scope(architecture.backbone)
        trunk = _xception if architecture.backbone in XCEPTIONS else _resnet
        names = {head.last: "logits/semantic"}
        for conv, norm, theirs in (
            *((conv, norm, f"{scope}/{theirs}") for conv, norm, theirs in trunk(architecture)),
            (f"{head.aspp}.convs.0.0", f"{head.aspp}.convs.0.1", "aspp0"),
            (f"{head.image_pool}.1", f"{head.image_pool}.2", "image_pooling"),
            (f"{head.aspp}.project.0", f"{head.aspp}.project.1", "concat_projection"),
            ("classifier.low.0", "classifier.low.1", "decoder/feature_projection0"),
            *(part for n, layers in head.branches() for part in _mixed(layers, f"aspp{n}")),
            *(
                part
                for n, layers in head.fuses()
                for part in _mixed(layers, f"decoder/decoder_conv{n}")
            ),
        ):
            names |= {conv: theirs, norm: f"{theirs}/BatchNorm"}
        return names

    def key(self, module: nn.Module, name: str, parameter: str) -> str:
        """As ``Layout.key``."""
        if isinstance(module, nn.BatchNorm2d):
            return f"{name}/{_NORM.get(parameter, parameter)}"
        assert isinstance(module, nn.Conv2d)
        if parameter == "bias":
            return f"{name}/biases"
        return f"{name}/{'depthwise_weights' if module.groups > 1 else 'weights'}"

    def brought(self, weight: Tensor, module: nn.Module) -> Tensor:
        """As ``Layout.brought``: kernels are (y, x, in, out) there."""
        if weight.ndim != 4:
            return weight
        depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
        return weight.permute(2, 3, 0, 1) if depthwise else weight.permute(3, 2, 0, 1)

    def moved(self, architecture: Architecture) -> Mapping[str, int]:
        """As ``Layout.moved``."""
        if not architecture.image_pooling:
            return {}
        return {f"{Head(architecture).aspp}.project.0": 256}

    def scaling(self, architecture: Architecture) -> Scaling:
        """As ``Layout.scaling``: the mean of red, green and blue off, or -1 to 1."""
        if architecture.backbone.endswith("-tf"):
            return Scaling(type="z-score", mean=(123.15, 115.90, 103.06), std=(1.0,))
        return UNIT_RANGE


def _backbone(tensors: Mapping[str, Tensor]) -> str:
    """Of the scope that its names begin with; three convolutions at its start are ``-beta``."""
    scopes = {key.split("/")[0] for key in tensors}
    for name in XCEPTIONS:
        if _scope(name) in scopes:
            return name
    for depth in _DEPTHS:
        scope = _scope(depth)
        if scope in scopes:
            return f"{depth}-beta" if f"{scope}/conv1_1/weights" in tensors else f"{depth}-tf"
    raise BundleError(
        "no trunk xception_41, _65 or _71, resnet_v1_50 or _101 in the file; its names:"
        f" {some(sorted(tensors))}"
    )


def _scope(backbone: str) -> str:
    name = backbone.partition("-")[0]
    if name in XCEPTIONS:
        return name.replace("xception", "xception_")
    return name.replace("resnet", "resnet_v1_")


def _xception(architecture: Architecture) -> Iterator[tuple[str, str, str]]:
    """Our convolution and norm, and their name, of all in the trunk."""
    for number in (0, 1):
        ours = f"backbone.stem.{number}"
        yield f"{ours}.conv", f"{ours}.bn", f"entry_flow/conv1_{number + 1}"
    count = len(XCEPTIONS[architecture.backbone])
    entry = 5 if architecture.backbone == "xception71" else 3
    for number in range(count):
        if number < entry:
            unit = f"entry_flow/block{number + 1}/unit_1"
        elif number < count - 2:
            unit = f"middle_flow/block1/unit_{number - entry + 1}"
        else:
            unit = f"exit_flow/block{number - count + 3}/unit_1"
        ours, theirs = f"backbone.blocks.{number}", f"{unit}/xception_module"
        yield f"{ours}.shortcut.conv", f"{ours}.shortcut.bn", f"{theirs}/shortcut"
        for n in (1, 2, 3):
            layer = f"{ours}.stack.conv{n}"
            yield f"{layer}.conv_dw", f"{layer}.bn_dw", f"{theirs}/separable_conv{n}_depthwise"
            yield f"{layer}.conv_pw", f"{layer}.bn_pw", f"{theirs}/separable_conv{n}_pointwise"


def _resnet(architecture: Architecture) -> Iterator[tuple[str, str, str]]:
    """As ``_xception``."""
    depth, _, kind = architecture.backbone.partition("-")
    if kind == "beta":
        yield "backbone.conv1.0", "backbone.conv1.1", "conv1_1"
        yield "backbone.conv1.3", "backbone.conv1.4", "conv1_2"
        yield "backbone.conv1.6", "backbone.bn1", "conv1_3"
    else:
        yield "backbone.conv1", "backbone.bn1", "conv1"
    for block, units in enumerate(_DEPTHS[depth], start=1):
        for unit in range(units):
            ours = f"backbone.layer{block}.{unit}"
            theirs = f"block{block}/unit_{unit + 1}/bottleneck_v1"
            yield f"{ours}.downsample.0", f"{ours}.downsample.1", f"{theirs}/shortcut"
            for n in (1, 2, 3):
                yield f"{ours}.conv{n}", f"{ours}.bn{n}", f"{theirs}/conv{n}"


def _mixed(layers: Mapping[str, str], theirs: str) -> Iterator[tuple[str, str, str]]:
    """A convolution, or the two parts of one, with its norm and their name."""
    if "conv" in layers:
        yield layers["conv"], layers["bn"], theirs
    else:
        for part in ("depthwise", "pointwise"):
            yield layers[part], layers[f"{part} bn"], f"{theirs}_{part}"
