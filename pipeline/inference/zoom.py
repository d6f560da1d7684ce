"""The scene at another size, and where its tiles lie there.

Resizing is linear, by a whole fraction, with corners as the network has them: a tile resized by
itself is a cut out of the scene resized as a whole, but for pixels at the tile's edge that want
neighbours. Those lie in its halo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pipeline.domain import ContextWindow, Halo, Reach, Shape
from pipeline.models.frame import Frame
from pipeline.models.geometry import Scale


@dataclass(frozen=True, slots=True)
class Zoom:
    """The scene at ``up / down`` of its size, on all axes.

    >>> Zoom(3, 4).stride(8), Zoom(1, 2).stride(8), Zoom(2, 1).stride(8)
    (32, 16, 4)
    """

    up: int
    down: int
    """The fraction, in lowest terms."""

    @property
    def natural(self) -> bool:
        """Whether the scene stays as it is."""
        return self.up == self.down

    def stride(self, stride: int) -> int:
        """Pixels of the scene that are whole strides of a network which sees it resized."""
        return self.down * stride // math.gcd(self.up, stride)

    def scale(self, like: Scale) -> Scale:
        """How the image is resized for a network with ``like`` as its last layer."""
        ndim = len(like.up)
        up, down = (self.up,) * ndim, (self.down,) * ndim
        return Scale(up=up, down=down, align_corners=like.align_corners)

    def upsample(self, last: Scale) -> Scale:
        """From the coarse logits to the scene's own pixels, where ``last`` leads to the resized."""
        up = [side * self.down for side in last.up]
        down = [side * self.up for side in last.down]
        common = [math.gcd(a, b) for a, b in zip(up, down, strict=True)]
        return Scale(
            up=tuple(a // n for a, n in zip(up, common, strict=True)),
            down=tuple(b // n for b, n in zip(down, common, strict=True)),
            align_corners=last.align_corners,
        )

    def frame(self, frame: Frame, *, like: Scale) -> Frame:
        """The place, in the resized scene, of an input that starts on the stride."""
        origin = tuple(place * self.up // self.down for place in frame.origin)
        return Frame(origin, self.scale(like).shape(frame.shape))

    def reach(self, reach: Reach, *, stride: int) -> Reach:
        """What tiles on ``stride``, in pixels of the scene, need: of it, not of the resized one.

        ``reach`` is what the network needs of what it sees.
        """
        if self.natural and stride == reach.stride:
            return reach
        return Reach(
            stride=stride,
            endpoint=reach.endpoint,
            halo=self._halo(reach.halo).round_up(stride),
            window=reach.window and self._window(reach.window, stride=stride),
        )

    def _window(self, window: ContextWindow, *, stride: int) -> ContextWindow:
        """One that holds ``window``, whose steps need not be whole pixels of the scene."""
        half = Halo(window.half, window.half)
        wide = half if self.natural else self._halo(half)
        sides = wide.round_up(stride).before
        step = Halo(window.steps, window.steps)  # its places are rounded to steps, these to strides
        return replace(
            window,
            size=tuple(2 * side + stride for side in sides),
            steps=(stride,) * len(sides),
            inner=self._halo(window.inner + step),
            outer=self._halo(window.outer),
        )

    def _halo(self, halo: Halo) -> Halo:
        """Pixels of the scene for pixels of the resized one.

        One more of each: those of the resized scene, as its logits, lie between two of the scene.
        """
        return halo if self.natural else Halo(self._pixels(halo.before), self._pixels(halo.after))

    def _pixels(self, sides: Shape) -> Shape:
        return tuple(-(-(side + 1) * self.down // self.up) + 1 for side in sides)


NATURAL = Zoom(1, 1)
"""The scene as it is."""
