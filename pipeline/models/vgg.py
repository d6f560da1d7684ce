"""VGG-16 at an output stride of 8, its fully connected layers as convolutions.

DeepLab v1 (Chen et al. 2015, arXiv 1412.7062, section 3.1) and v2 (arXiv 1606.00915) share it.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

_STAGES = ((2, 64, 2, 1), (2, 128, 2, 1), (3, 256, 2, 1), (3, 512, 1, 1), (3, 512, 1, 2))
"""Convolutions, their channels, the stride of the pool after them, and their dilation."""

FC_WIDTH = 1024
"""Channels of fc6 and fc7: a quarter of VGG-16's, which costs no accuracy (v1, section 5)."""


class VggTrunk(nn.Sequential):
    """The convolutions, key for key torchvision's ``vgg16().features``.

    The last two of five pools have no stride, and conv5 is dilated instead. Pools are 3x3, not
    2x2: centred, so that every resolution is sampled at the pixels of the finer one.
    """

    channels = _STAGES[-1][1]
    """Of the features."""

    def __init__(self, *, bands: int) -> None:
        layers: list[nn.Module] = []
        inputs = bands
        for depth, width, stride, rate in _STAGES:
            for _ in range(depth):
                convolution = nn.Conv2d(inputs, width, 3, padding=rate, dilation=rate)
                layers += [start(convolution), nn.ReLU(inplace=True)]
                inputs = width
            layers.append(nn.MaxPool2d(3, stride=stride, padding=1))
        super().__init__(*layers)

    def pooled(self, image_BCS: Tensor) -> list[Tensor]:
        """Return what each of the five pools gives, (B, C, *S) at strides of 2, 4, 8, 8 and 8."""
        features_BCS, found = image_BCS, []
        for layer in self:
            features_BCS = layer(features_BCS)
            if isinstance(layer, nn.MaxPool2d):
                found.append(features_BCS)
        return found


class FcBranch(nn.Sequential):
    """fc6, whose dilation sets the field of view, fc7, and the classifier fc8."""

    fc8: nn.Conv2d

    def __init__(self, inputs: int, classes: int, *, rate: int) -> None:
        super().__init__(
            OrderedDict(
                fc6=start(nn.Conv2d(inputs, FC_WIDTH, 3, padding=rate, dilation=rate)),
                relu6=nn.ReLU(inplace=True),
                drop6=nn.Dropout(0.5),
                fc7=start(nn.Conv2d(FC_WIDTH, FC_WIDTH, 1)),
                relu7=nn.ReLU(inplace=True),
                drop7=nn.Dropout(0.5),
                fc8=classifier(FC_WIDTH, classes, kernel=1),
            )
        )


def start(convolution: nn.Conv2d) -> nn.Conv2d:
    """The layer with fresh weights for a ReLU after it; there is no norm to mend the scale."""
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution


def classifier(inputs: int, classes: int, *, kernel: int, rate: int = 1) -> nn.Conv2d:
    """A convolution that gives scores, N(0, 0.01) as published."""
    padding = kernel // 2 * rate
    layer = nn.Conv2d(inputs, classes, kernel, padding=padding, dilation=rate)
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
