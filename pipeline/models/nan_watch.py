"""Where in a network NaN comes from, and where it gets lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class NanWatch:
    """Watches the layers of a module while it runs; nothing, for what has none.

    A context manager: the module is as before once it is left.
    """

    def __init__(self, module: object, *, held: Sequence[str] = ()) -> None:
        """Watch ``module``; the outputs of the layers ``held`` are cleaned of NaN."""
        self._parts = dict(module.named_modules()) if isinstance(module, nn.Module) else {}
        self._held = frozenset(held)
        self._handles: list[RemovableHandle] = []
        self._partly: set[str] = set()
        self._entered: dict[str, None] = {}
        self._left: set[str] = set()
        self.filled: str | None = None
        """The first layer that made all of its output NaN of an input that was so in part."""

    @property
    def swallowed(self) -> tuple[str, ...]:
        """Layers that NaN went into and never came out of, innermost first."""
        return tuple(name for name in self._entered if name not in self._left)

    def __enter__(self) -> Self:
        for name, part in self._parts.items():
            self._handles += self._attach(name, part)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _attach(self, name: str, part: nn.Module) -> list[RemovableHandle]:
        label = name or type(part).__name__
        dirty = False

        # The input is looked at before: a layer may write into it.
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal dirty
            found = list(_tensors((args, kwargs)))
            dirty = any(bool(tensor.isnan().any()) for tensor in found)
            if dirty and not all(bool(tensor.isnan().all()) for tensor in found):
                self._partly.add(label)
            else:
                self._partly.discard(label)

        def leave(_: nn.Module, __: object, output: Any) -> Any:
            found = list(_tensors(output))
            if dirty:
                self._entered.setdefault(label)
            if any(bool(tensor.isnan().any()) for tensor in found):
                self._left.add(label)
            if label in self._held:
                return _without_nan(output)
            full = bool(found) and all(bool(tensor.isnan().all()) for tensor in found)
            if full and label in self._partly and self.filled is None:
                self.filled = label
            return None

        return [
            part.register_forward_pre_hook(enter, with_kwargs=True),
            part.register_forward_hook(leave),
        ]


def _tensors(value: object) -> Iterator[Tensor]:
    """Tensors of floats in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _without_nan(value: Any) -> Any:
    """The same nest with 0 where NaN was; new tensors."""
    if isinstance(value, Tensor):
        return value.nan_to_num(0.0)
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return tuple(map(_without_nan, value))
    return value
