"""Where a network's input lies in the padded scene; what image pooling needs to know."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.domain import Region, Shape
from pipeline.errors import RegionError


@dataclass(frozen=True, slots=True)
class Frame:
    """The place of an input in the scene that has been padded to a valid size.

    >>> Frame.of(Region((64, 0), (128, 64)), shape=(256, 256))
    Frame(origin=(64, 0), shape=(256, 256))
    """

    origin: tuple[int, ...]
    """Pixel of the padded scene at which the input's first element lies."""

    shape: Shape
    """Shape of the padded scene, in pixels."""

    @classmethod
    def of(cls, region: Region, *, shape: Shape) -> Frame:
        """The frame of what is read from ``region`` of a padded scene of ``shape``."""
        return cls(region.start, tuple(shape))

    def check(self, size: Shape, *, stride: int, endpoint: int) -> None:
        """Raise RegionError unless an input of ``size`` px fits here, on the stride."""
        sides = (*self.origin, *(side - endpoint for side in (*size, *self.shape)))
        if len(size) != len(self.shape) or any(side % stride for side in sides):
            beyond = f" and {endpoint} px more but for the origin" if endpoint else ""
            raise RegionError(
                f"an input of {size} px at {self.origin} in a scene of {self.shape} px:"
                f" every number must be a multiple of the output stride {stride} px{beyond}"
            )
        if any(a < 0 or a + n > b for a, n, b in zip(self.origin, size, self.shape, strict=True)):
            raise RegionError(
                f"an input of {size} px at {self.origin} reaches outside the padded scene"
                f" of {self.shape} px; cut it there"
            )
