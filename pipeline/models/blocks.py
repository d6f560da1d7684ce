"""The layers nearly everything here is made of, in 2-D and 3-D."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from torch import nn

from pipeline.models.architecture import Separable

CONV: MappingProxyType[int, Callable[..., nn.Module]] = MappingProxyType(
    {2: nn.Conv2d, 3: nn.Conv3d}
)
_NORM: MappingProxyType[int, Callable[..., nn.Module]] = MappingProxyType(
    {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
)


def conv(dims: int, inputs: int, outputs: int, *, kernel: int, dilation: int = 1) -> nn.Module:
    """A convolution without bias that keeps the size."""
    return CONV[dims](
        inputs, outputs, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=False
    )


def depthwise(dims: int, channels: int, *, stride: int = 1, dilation: int = 1) -> nn.Module:
    """A 3x3 convolution of each channel by itself, without bias."""
    return CONV[dims](
        channels,
        channels,
        3,
        stride=stride,
        padding=dilation,
        dilation=dilation,
        groups=channels,
        bias=False,
    )


def norm(dims: int, channels: int, *, epsilon: float = 1e-5) -> nn.Module:
    """Batch norm over ``channels``."""
    return _NORM[dims](channels, eps=epsilon)


def classify(dims: int, inputs: int, classes: int) -> nn.Module:
    """The last 1x1 convolution, with bias."""
    return CONV[dims](inputs, classes, 1)


def conv_norm_relu(
    dims: int, inputs: int, outputs: int, *, kernel: int, dilation: int = 1
) -> list[nn.Module]:
    """A convolution that keeps the size, batch norm and ReLU."""
    layers = [conv(dims, inputs, outputs, kernel=kernel, dilation=dilation)]
    return [*layers, norm(dims, outputs), nn.ReLU(inplace=True)]


def mix(
    dims: int, inputs: int, outputs: int, *, dilation: int = 1, separable: Separable | None
) -> list[nn.Module]:
    """A 3x3 convolution, batch norm and ReLU; the convolution in two parts where ``separable``."""
    if separable is None:
        return conv_norm_relu(dims, inputs, outputs, kernel=3, dilation=dilation)
    layers = [depthwise(dims, inputs, dilation=dilation)]
    if separable == "normed":
        layers += [norm(dims, inputs), nn.ReLU(inplace=True)]
    return [*layers, *conv_norm_relu(dims, inputs, outputs, kernel=1)]
