"""Networks made on torch's meta device: no memory, no time and no random numbers spent."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Unfilled(TorchFunctionMode):
    """Inside it weights are not drawn from a normal distribution.

    Where they lie on the meta device there is nothing to fill, and torch would load its compiler to
    do so: 1.5 s and 80 MiB (measured).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Leave a tensor that was to be filled as it is."""
        return args[0] if func is Tensor.normal_ else func(*args, **(kwargs or {}))
