"""How much memory a tile takes, predicted without computing it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.domain import Shape
from pipeline.models.bundle import Bundle
from pipeline.models.deeplab import build_network
from pipeline.models.frame import Frame
from pipeline.models.receptive_field import TRACING

_HELD = 3.0
"""Bytes held over those of the widest module: its neighbours, logits at full resolution, scratch,
blocks freed but not returned. Measured 2.8 on the slim network, fp32, CPU."""


def activation_bytes(bundle: Bundle, shape: Shape) -> int:
    """Peak bytes that the network and its logits take on an input of ``shape`` px, in float32.

    Counts what every module, from layers to the whole network, must hold at once: its inputs and
    outputs. Nothing is computed: the tensors are on torch's meta device.
    """
    peak = 0

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal peak
        held = [t for t in (*inputs, output) if isinstance(t, torch.Tensor)]
        peak = max(peak, sum(t.numel() * t.element_size() for t in held))

    with TRACING, torch.device("meta"), torch.inference_mode():
        network = build_network(
            bundle.architecture, bands=bundle.input.band_count, classes=len(bundle.classes)
        ).eval()
        for module in network.modules():
            module.register_forward_hook(note)
        image_BCS = torch.empty((1, bundle.input.band_count, *shape))
        network(image_BCS, Frame((0,) * len(shape), shape))
    return int(_HELD * peak)
