"""Untrained bundles, for tests, benchmarks and trying out a machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.architecture import Architecture
from pipeline.models.bundle import Bundle, CustomArchitecture, save_bundle
from pipeline.models.custom_bundle import save_custom
from pipeline.models.custom_network import CustomNetwork, network_of_entry_point
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.frame import Frame
from pipeline.models.input_spec import ClassInfo, InputSpec, Scaling

_CROP = {2: (512, 512), 3: (96, 96, 96)}
_PROBE = {2: (96, 96), 3: (32, 32, 32)}

ANY_IMAGE = Scaling(type="z-score", mean=(0.0,), std=(100.0,))
"""For images nothing is known of: bytes, reflectances and CT numbers all give several classes."""


def new_bundle(
    path: str | Path,
    *,
    architecture: Architecture | CustomArchitecture,
    bands: tuple[str, ...] | int,
    classes: int,
    seed: int,
    scaling: Scaling = ANY_IMAGE,
) -> Bundle:
    """Write an untrained bundle whose output is not flat, and return it.

    The same arguments give the same bytes on the same machine. A network of an entry point is one
    whose last convolution gives the scores. Raises BundleError.
    """
    spec = InputSpec(bands=bands, dtype="float32", scaling=scaling)
    bundle = Bundle(
        name=f"fresh-{_name(architecture)}",
        version=1,
        architecture=architecture,
        classes=tuple(
            ClassInfo.numbered(number, of=classes, name=f"class-{number}")
            for number in range(classes)
        ),
        ignore_index=255 if classes <= 255 else 65535,
        input=spec,
        crop=_CROP[architecture.dims],
        training={"seed": seed, "steps": 0},
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        if isinstance(architecture, Architecture):
            network = build_network(architecture, bands=spec.band_count, classes=classes)
            spread(network)
            return save_bundle(path, bundle, network.state_dict())
        own = _own_network(architecture, bands=spec.band_count, classes=classes)
        spread(own)
    return save_custom(path, bundle, own.module.state_dict())


def _name(architecture: Architecture | CustomArchitecture) -> str:
    if isinstance(architecture, Architecture):
        return f"{architecture.family}-{architecture.backbone}"
    return str(architecture.entry_point).rpartition(":")[2].lower()


def _own_network(architecture: CustomArchitecture, *, bands: int, classes: int) -> CustomNetwork:
    assert architecture.entry_point is not None, "a program has its weights"
    module = network_of_entry_point(architecture.entry_point, architecture.arguments)
    return CustomNetwork(module, architecture, bands=bands, classes=classes)


def spread(network: DeepLab | CustomNetwork) -> None:
    """Give fresh layers statistics and the last ones a direction, so that all classes occur.

    With the statistics of a new norm (0 and 1) the residual sums grow from block to block, without
    norms the features fade, and one class wins everywhere. They are taken from noise of several
    wavelengths instead.
    """
    network.eval()
    for layer in network.modules():
        if isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0.0, 0.2)
            layer.momentum = None  # statistics of the one batch that follows
            layer.train()
    noise_BCS = _noise(network)
    with torch.no_grad():
        _settle(network, noise_BCS)
        network.eval()
        features = [_last_features(network, gain * noise_BCS) for gain in (1.0, 16.0)]
        for layer, parts in zip(_last_layers(network), zip(*features, strict=True), strict=True):
            _balance(layer, parts)


def _settle(network: DeepLab | CustomNetwork, noise_BCS: Tensor) -> None:
    """Run the network once, each convolution set as soon as its input is there."""
    hooks = []
    waiting = set(network.modules()) - set(_last_layers(network))
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            hooks.append(layer.register_forward_pre_hook(partial(_flatten, image_BCS=noise_BCS)))
            if layer.bias is not None:  # no norm follows
                hooks.append(layer.register_forward_hook(partial(_normalise, waiting)))
    _run(network, noise_BCS)
    for hook in hooks:
        hook.remove()


def _flatten(layer: nn.Module, inputs: tuple[Tensor, ...], *, image_BCS: Tensor) -> None:
    """Make filters of the image blind to a constant, so that an image's offset does not decide."""
    if inputs[0] is image_BCS:
        assert isinstance(layer, (nn.Conv2d, nn.Conv3d))
        layer.weight -= layer.weight.mean(tuple(range(2, layer.weight.ndim)), keepdim=True)


def _normalise(
    waiting: set[nn.Module], layer: nn.Module, inputs: tuple[Tensor, ...], output_BCS: Tensor
) -> Tensor | None:
    """Give a layer that waits for it the statistics that a norm after it would have."""
    if layer not in waiting:
        return None
    waiting.remove(layer)  # it may be called again, at another scale
    assert isinstance(layer, (nn.Conv2d, nn.Conv3d))
    assert layer.bias is not None
    rows_CP = output_BCS.transpose(0, 1).flatten(1)
    offset_C = torch.empty_like(layer.bias).normal_(0.0, 0.2)
    factor_C = torch.empty_like(layer.bias).uniform_(0.5, 1.5) / rows_CP.std(1)
    shape = (-1, *(1,) * (layer.weight.ndim - 1))
    layer.weight *= factor_C.reshape(shape)
    layer.bias.copy_((layer.bias - rows_CP.mean(1)) * factor_C + offset_C)
    settled_BCS: Tensor = layer.forward(inputs[0])
    return settled_BCS


def _balance(last: nn.Module, features: tuple[Tensor, ...]) -> None:
    """Make the classes' scores 0 in the mean over each of ``features``, of deviation 1.

    ReLU features point the same way on the whole, and further the stronger the image's contrast:
    a class that lay that way would win everywhere. Each is (B, C, *S); the first sets the scale.
    """
    assert isinstance(last, (nn.Conv2d, nn.Conv3d))
    assert last.bias is not None
    means_CN = torch.stack([part.transpose(0, 1).flatten(1).mean(1) for part in features], dim=1)
    basis_CN = torch.linalg.qr(means_CN).Q
    weight_KTC = last.weight.flatten(2).transpose(1, 2)
    weight_KTC = weight_KTC - weight_KTC @ basis_CN @ basis_CN.T
    last.weight.copy_(weight_KTC.transpose(1, 2).reshape(last.weight.shape))
    last.bias.zero_()
    scores_KP = last(features[0]).transpose(0, 1).flatten(1)
    last.weight /= scores_KP.std(1).reshape(-1, *(1,) * (last.weight.ndim - 1))


def _last_features(network: DeepLab | CustomNetwork, image_BCS: Tensor) -> list[Tensor]:
    """What each of the last layers is given, when it is first called."""
    seen: dict[nn.Module, Tensor] = {}

    def see(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(layer, inputs[0])

    last = _last_layers(network)
    hooks = [layer.register_forward_pre_hook(see) for layer in last]
    _run(network, image_BCS)
    for hook in hooks:
        hook.remove()
    return [seen[layer] for layer in last]


def _last_layers(network: DeepLab | CustomNetwork) -> tuple[nn.Module, ...]:
    """The convolutions that give scores: of a network that is not ours the last, as registered."""
    if isinstance(network, DeepLab):
        return network.last_layers
    layers = [part for part in network.modules() if isinstance(part, (nn.Conv2d, nn.Conv3d))]
    return (layers[-1],)


def _run(network: DeepLab | CustomNetwork, image_BCS: Tensor) -> None:
    network.coarse_logits(image_BCS, Frame((0,) * (image_BCS.ndim - 2), tuple(image_BCS.shape[2:])))


def _noise(network: DeepLab | CustomNetwork) -> Tensor:
    """Four images (B, C, *S) of noise at wavelengths of 1 to 16 px, deviation about 1."""
    size = tuple(side + network.align_corners for side in _PROBE[network.architecture.dims])
    mode = "bilinear" if len(size) == 2 else "trilinear"
    parts = [
        F.interpolate(
            torch.randn(4, network.bands, *(side // step for side in size)), size=size, mode=mode
        )
        for step in (1, 4, 16)
    ]
    return torch.stack(parts).sum(0)
