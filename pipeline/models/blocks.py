"""The layers nearly everything here is made of, in 2-D and 3-D."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from torch import nn

from pipeline.models.architecture import Separable
from pipeline.models.geometry import per_axis

Rate = int | tuple[int, ...]
"""A dilation in features, on all axes or on each."""

CONV: MappingProxyType[int, Callable[..., nn.Module]] = MappingProxyType(
    {2: nn.Conv2d, 3: nn.Conv3d}
)
_NORM: MappingProxyType[int, Callable[..., nn.Module]] = MappingProxyType(
    {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
)


def axis_strides(steps: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Strides of the layers that bring features ``steps`` apart, each at most 2.

    An axis of a smaller step has its own last.

    >>> axis_strides((2, 8, 8))
    [(1, 2, 2), (1, 2, 2), (2, 2, 2)]
    """
    halvings = [step.bit_length() - 1 for step in steps]
    return [tuple(2 if n >= left else 1 for n in halvings) for left in range(max(halvings), 0, -1)]


def conv(dims: int, inputs: int, outputs: int, *, kernel: int, dilation: Rate = 1) -> nn.Module:
    """A convolution without bias that keeps the size."""
    rates = per_axis(dilation, dims)
    padding = tuple(kernel // 2 * rate for rate in rates)
    return CONV[dims](inputs, outputs, kernel, padding=padding, dilation=rates, bias=False)


def depthwise(dims: int, channels: int, *, stride: int = 1, dilation: Rate = 1) -> nn.Module:
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
    dims: int, inputs: int, outputs: int, *, kernel: int, dilation: Rate = 1
) -> list[nn.Module]:
    """A convolution that keeps the size, batch norm and ReLU."""
    layers = [conv(dims, inputs, outputs, kernel=kernel, dilation=dilation)]
    return [*layers, norm(dims, outputs), nn.ReLU(inplace=True)]


def mix(
    dims: int, inputs: int, outputs: int, *, dilation: Rate = 1, separable: Separable | None
) -> list[nn.Module]:
    """A 3x3 convolution, batch norm and ReLU; the convolution in two parts where ``separable``."""
    if separable is None:
        return conv_norm_relu(dims, inputs, outputs, kernel=3, dilation=dilation)
    layers = [depthwise(dims, inputs, dilation=dilation)]
    if separable == "normed":
        layers += [norm(dims, inputs), nn.ReLU(inplace=True)]
    return [*layers, *conv_norm_relu(dims, inputs, outputs, kernel=1)]
