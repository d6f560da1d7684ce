"""Untrained bundles, for tests, benchmarks and trying out a machine."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.architecture import Architecture
from pipeline.models.bundle import Bundle, save_bundle
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
    architecture: Architecture,
    bands: tuple[str, ...] | int,
    classes: int,
    seed: int,
    scaling: Scaling = ANY_IMAGE,
) -> Bundle:
    """Write an untrained bundle whose output is not flat, and return it.

    The same arguments give the same bytes on the same machine. Raises BundleError.
    """
    spec = InputSpec(bands=bands, dtype="float32", scaling=scaling)
    bundle = Bundle(
        name=f"fresh-{architecture.family}-{architecture.backbone}",
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
        network = build_network(architecture, bands=spec.band_count, classes=classes)
        spread(network)
    return save_bundle(path, bundle, network.state_dict())


def spread(network: DeepLab) -> None:
    """Give fresh batch norms statistics and the last layer a direction, so that all classes occur.

    With the statistics of a new layer (0 and 1) the residual sums grow from block to block and one
    class wins everywhere. They are taken from noise of several wavelengths instead.
    """
    network.eval()
    _flatten_stem(network)
    for layer in network.modules():
        if isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0.0, 0.2)
            layer.momentum = None  # statistics of the one batch that follows
            layer.train()
    noise_BCS = _noise(network)
    with torch.no_grad():
        _last_features(network, noise_BCS)
        network.eval()
        features = [_last_features(network, gain * noise_BCS) for gain in (1.0, 16.0)]
        _balance(network.classifier[-1], features)


def _flatten_stem(network: DeepLab) -> None:
    """Make the first filters blind to a constant, so that an image's offset does not decide."""
    first = next(m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    with torch.no_grad():
        first.weight -= first.weight.mean(tuple(range(2, first.weight.ndim)), keepdim=True)


def _balance(last: nn.Module, features: list[Tensor]) -> None:
    """Make the classes' logits 0 in the mean over each of ``features``, of deviation 1.

    ReLU features point the same way on the whole, and further the stronger the image's contrast:
    a class that lay that way would win everywhere. Each is (B, C, *S); the first sets the scale.
    """
    assert isinstance(last, (nn.Conv2d, nn.Conv3d))
    assert last.bias is not None
    means_CN = torch.stack([part.transpose(0, 1).flatten(1).mean(1) for part in features], dim=1)
    basis_CN = torch.linalg.qr(means_CN).Q
    weight_KC = last.weight.flatten(1)
    weight_KC = weight_KC - weight_KC @ basis_CN @ basis_CN.T
    logits_KP = weight_KC @ features[0].transpose(0, 1).flatten(1)
    last.weight.copy_((weight_KC / logits_KP.std(1, keepdim=True)).reshape(last.weight.shape))
    last.bias.zero_()


def _last_features(network: DeepLab, image_BCS: Tensor) -> Tensor:
    """What the last layer is given."""
    seen: list[Tensor] = []
    hook = network.classifier[-1].register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    network.coarse_logits(image_BCS, Frame((0,) * (image_BCS.ndim - 2), tuple(image_BCS.shape[2:])))
    hook.remove()
    return seen[0]


def _noise(network: DeepLab) -> Tensor:
    """Four images (B, C, *S) of noise at wavelengths of 1 to 16 px, deviation about 1."""
    size = _PROBE[network.architecture.dims]
    mode = "bilinear" if len(size) == 2 else "trilinear"
    parts = [
        F.interpolate(
            torch.randn(4, network.bands, *(side // step for side in size)), size=size, mode=mode
        )
        for step in (1, 4, 16)
    ]
    return torch.stack(parts).sum(0)
