"""torchvision's MobileNetV3-Large as a trunk.

Its squeeze-and-excitation layers take means over all that is read: no halo makes its tiles agree.
Axes in array names: B batch, C channel, S space (y, x).
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large


class MobileNetTrunk(nn.Sequential):
    """The features of torchvision's MobileNetV3-Large at output stride 16, for any bands."""

    channels, low_channels, low_stride = 960, 24, 4

    def __init__(self, *, bands: int) -> None:
        layers = list(mobilenet_v3_large(weights=None, dilated=True).features)
        if bands != 3:
            layers[0][0] = nn.Conv2d(bands, 16, 3, stride=2, padding=1, bias=False)
            nn.init.kaiming_normal_(layers[0][0].weight, mode="fan_out")
        super().__init__(*layers)

    def taps(self, image_BCS: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, 24, *S / 4) features, the last at stride 4, and (B, 960, *S / 16)."""
        features_BCS = low_BCS = image_BCS
        for number, layer in enumerate(self):
            features_BCS = layer(features_BCS)
            if number == 3:
                low_BCS = features_BCS
        return low_BCS, features_BCS
