"""ResNet-101 as its authors released it, at an output stride of 8.

Torchvision's has the stride of a stage in the first 3x3 convolution; here it lies in the 1x1
before it, as the weights of DeepLab v2 want it (arXiv 1606.00915, section 4.1.2).
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet


class MsraTrunk(ResNet):  # type: ignore[misc]
    """Up to ``layer4``, key for key torchvision's; every block of a dilated layer has its rate."""

    channels = 2048
    """Of the features."""

    def __init__(self, *, bands: int) -> None:
        super().__init__(
            Bottleneck, [3, 4, 23, 3], replace_stride_with_dilation=[False, True, True]
        )
        del self.avgpool, self.fc
        if bands != 3:
            self.conv1 = nn.Conv2d(bands, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool.ceil_mode = True
        strided = self.layer2[0]
        strided.conv1.stride, strided.conv2.stride = (2, 2), (1, 1)
        for layer, rate in ((self.layer3, 2), (self.layer4, 4)):
            layer[0].conv2.dilation = layer[0].conv2.padding = (rate, rate)

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Return (B, 2048, *S / 8) features."""
        stem_BCS = self.maxpool(self.relu(self.bn1(self.conv1(image_BCS))))
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(stem_BCS))))
        return features
