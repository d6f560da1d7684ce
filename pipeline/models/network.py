"""What every DeepLab is to the parts that train it, take it apart and tile it.

Axes in array names: B batch, C channel, K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

from torch import Tensor, nn

from pipeline.models.architecture import Architecture
from pipeline.models.context_pool import ContextPool
from pipeline.models.frame import Frame
from pipeline.models.resize import Resize


class DeepLab(nn.Module, ABC):
    """Coarse logits, and their resize to the input's size."""

    stride: int
    """Pixels by which the input must move for the output to move alike: the grid of tiles."""

    upsample: Resize
    """From coarse logits to the input's size."""

    def __init__(self, architecture: Architecture, *, bands: int, classes: int) -> None:
        super().__init__()
        self.architecture, self.bands, self.classes = architecture, bands, classes

    @property
    def align_corners(self) -> bool:
        """True: every resize aligns corners, sides are k x stride + 1 px; False: k x stride px."""
        return self.architecture.align_corners

    def forward(self, image_BCS: Tensor, frame: Frame) -> Tensor:
        """Return (B, K, *S) logits at the input's size."""
        logits_BKS: Tensor = self.upsample(self.coarse_logits(image_BCS, frame))
        return logits_BKS

    @abstractmethod
    def coarse_logits(self, image_BCS: Tensor, frame: Frame) -> Tensor:
        """Return (B, K, *S') logits at the network's own last resolution."""

    def score_maps(self, image_BCS: Tensor, frame: Frame) -> tuple[Tensor, ...]:
        """Return the (B, K, *S') score maps that training puts a loss on, each at its own size.

        The last is what the classes are read from. Here it is alone, and at the input's size.
        """
        return (self(image_BCS, frame),)

    @property
    @abstractmethod
    def last_layers(self) -> tuple[nn.Module, ...]:
        """The convolutions that give scores per class; the logits are their sum."""

    @property
    def pool(self) -> ContextPool | None:
        """The image-pooling branch; None for a network without one."""
        return None

    def pool_over(self, crop: Sequence[int] | None) -> Self:
        """Pool over windows of the training crop, in px; over all that is read where None."""
        return self
