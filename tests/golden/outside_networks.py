"""Figures of networks from outside, to compare ours with; run by hand where they are installed.

    pip install timm==1.0.31 segmentation-models-pytorch==0.6.0
    PYTHONPATH=. python tests/golden/outside_networks.py > tests/golden/outside_networks.json

Weights are drawn by position in the state dict, which has the same order there and here.
"""

from __future__ import annotations

import json
import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def fill(network: Network) -> Network:
    """Give every weight and statistic a value of its own, in float64, and set eval mode."""
    network = network.double().to_empty(device="cpu")
    for number, weight in enumerate(network.state_dict().values()):
        if weight.is_floating_point():
            phase_N = torch.arange(weight.numel(), dtype=torch.float64) * 0.7 + number * 1.3
            fan = math.prod(weight.shape[1:]) if weight.ndim > 1 else 1
            wave = torch.sin(phase_N * (1 + phase_N / 97)).reshape(weight.shape)
            weight.copy_(1 + 0.3 * wave if weight.ndim == 1 else wave * (3 / fan) ** 0.5)
    return network.eval()


def image(side: int) -> Tensor:
    """(1, 3, side, side) without symmetry, in float64."""
    place_N = torch.arange(3 * side * side, dtype=torch.float64)
    return torch.sin(place_N * 0.37 + (place_N / 61) ** 2).reshape(1, 3, side, side)


def figures(values_BCS: Tensor) -> dict[str, Any]:
    """What an array of features is told by."""
    return {
        "shape": list(values_BCS.shape),
        "mean": values_BCS.mean().item(),
        "deviation": values_BCS.std().item(),
        "some": values_BCS.flatten()[:: values_BCS.numel() // 5][:5].tolist(),
    }


def main() -> None:
    """Print the figures."""
    import segmentation_models_pytorch as smp
    import timm

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name, stride in (("xception41", 8), ("xception71", 32)):
            trunk = timm.create_model(name, num_classes=0, global_pool="", output_stride=stride)
            found[name] = figures(fill(trunk)(image(33)))
        plain = fill(smp.DeepLabV3("resnet50", encoder_weights=None, classes=5))
        features = plain.encoder(image(64))
        found["smp v3"] = figures(plain.segmentation_head[0](plain.decoder(features)))
        plus = fill(smp.DeepLabV3Plus("resnet50", encoder_weights=None, classes=5))
        # Its own quadruples the size, and so moves the corners that it says it aligns.
        plus.decoder.up = nn.Upsample(size=(25, 25), mode="bilinear", align_corners=True)
        features = plus.encoder(image(97))
        found["smp v3plus"] = figures(plus.segmentation_head[0](plus.decoder(features)))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
