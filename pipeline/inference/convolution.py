"""Which kernel computes a convolution.

Axes in array names: B batch, C channel, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONVOLVE: Mapping[int, Callable[..., Tensor]] = MappingProxyType({2: F.conv2d, 3: F.conv3d})


def convolve(
    part_BCS: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """As ``F.conv2d`` and ``F.conv3d``, by oneDNN wherever it computes in float32.

    By itself torch leaves 1x1 convolutions to a kernel of 0.4 of the speed where it has one
    thread, which moves the logits of a deep network by 4e-4 of their deviation, and 3-D boxes that
    are short along z and y to one of a fifth.
    """
    if part_BCS.device.type == "cpu" and part_BCS.dtype == torch.float32 and _onednn():
        return torch.mkldnn_convolution(part_BCS, weight, bias, padding, stride, dilation, groups)
    run = _CONVOLVE[part_BCS.ndim - 2]
    return run(part_BCS, weight, bias, stride, padding, dilation, groups)


def fix_convolutions(network: nn.Module) -> None:
    """Have every convolution of a network computed by ``convolve``, whatever the threads."""
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)) and layer.padding_mode == "zeros":
            layer._conv_forward = MethodType(_forward, layer)  # type: ignore[method-assign]


def _forward(
    layer: nn.Conv2d | nn.Conv3d, part_BCS: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    assert not isinstance(layer.padding, str)
    geometry = (layer.stride, layer.padding, layer.dilation)
    return convolve(part_BCS, weight, bias, *geometry, layer.groups)


def _onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
