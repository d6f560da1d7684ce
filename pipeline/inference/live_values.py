"""What a plain forward of a network holds at most: counted in one over a small image.

Axes in array names: B batch, C channel, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pipeline.models.deeplab import DeepLab, aspp_width
from pipeline.models.frame import Frame
from pipeline.models.stages import TRACING

_FLOAT32 = 4
_SIDE = {2: 64, 3: 32}
"""Side of the small image, in pixels, by number of axes; two strides where that is more."""

HEAP_BYTES = 128 * 2**20
"""What the heaps of a process keep, at most, of values below 32 MiB that were let go of: up to 112
MB measured, or as much as is alive where that is less; nothing where all values are larger."""


def live_px(network: DeepLab) -> float:
    """Bytes per pixel of the values that live at once in a forward, in float32; without weights.

    What callers hold while a layer runs is counted as well, which no list of layers tells.
    """
    stride, dims = network.stride, network.architecture.dims
    size = (max(2, -(-_SIDE[dims] // stride)) * stride + int(network.align_corners),) * dims
    weight = next(network.parameters())
    image_BCS = torch.zeros(1, network.bands, *size, device=weight.device)
    values = LiveValues()
    values.hold(image_BCS)
    with TRACING, torch.no_grad(), _Calls(values):
        network.coarse_logits(image_BCS, Frame((0,) * dims, size))
    pooled = 0.0
    if network.pool is not None:  # one mean here, which a larger image has for every feature
        pooled = aspp_width(network.architecture) / math.prod(network.architecture.steps)
    return values.peak / math.prod(size) + pooled * _FLOAT32


class LiveValues:
    """Bytes of the tensors that calls have made and nobody has let go of."""

    def __init__(self) -> None:
        self._held: dict[int, int] = {}
        self.peak = 0

    def hold(self, made: Any) -> None:
        """Count the memory of all tensors in what a call made, once, until it is freed."""
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                key = storage._cdata  # not where its memory is: on the meta device there is none
                if key not in self._held:
                    self._held[key] = storage.nbytes()
                    self.peak = max(self.peak, sum(self._held.values()))
                    weakref.finalize(storage, self._held.pop, key, None)


class _Calls(TorchFunctionMode):
    """Holds what torch's functions make: watching operations instead would load its compiler."""

    def __init__(self, values: LiveValues) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._values.hold(result)
        return result
