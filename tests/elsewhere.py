"""A device that is not there: tensors on it hold their values here, and mix with no others.

Its name is ``meta``: torch asks no driver for that. An operation that would mix devices on CUDA
raises AssertionError, and what was not copied back cannot become an array.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Elsewhere(torch.Tensor):
    """A tensor of that device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device="meta",
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} while no device is played")


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        there = [each for each in tensors if isinstance(each, Elsewhere)]
        if there and func is not torch.ops.aten._to_copy.default:
            mixed = [each for each in tensors if not isinstance(each, Elsewhere) and each.ndim]
            assert not mixed, f"{func} mixes devices"
        away = str(kwargs.get("device", "meta" if there else "cpu")) == "meta"
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        found = func(*tree_map(_held, args), **tree_map(_held, kwargs))

        def wrapped(each: Any) -> Any:
            if not (away and isinstance(each, Tensor)):
                return each
            changed = [one for one in there if one.held is each]
            return changed[0] if changed else Elsewhere(each)

        return tree_map(wrapped, found)


class _Constructors(TorchFunctionMode):
    """Tensors of numbers: torch makes them before an operation can be seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in (torch.tensor, torch.as_tensor) or str(kwargs.get("device")) != "meta":
            return func(*args, **kwargs)
        if isinstance(args[0], Elsewhere):
            return args[0]
        del kwargs["device"]
        return Elsewhere(func(*args, **kwargs))


def _held(each: Any) -> Any:
    return each.held if isinstance(each, Elsewhere) else each


@contextmanager
def played() -> Iterator[str]:
    """The device's name, while it can be used."""
    with _Operations(), _Constructors():
        yield "meta"
