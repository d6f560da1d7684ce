"""Values of a ``crf`` part, each checked; a refusal is one line that names the place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import CrfError

MOST = 1e12
"""Of weights, costs and deviations: a weight times a cost times all pixels stays in float32."""


def mapping(value: object, *, where: str) -> Mapping[str, Any]:
    """``value`` if it is a mapping. Raises CrfError."""
    if not isinstance(value, Mapping):
        raise CrfError(f"{where}: a mapping is needed, found {value!r}")
    return value


def sequence(value: object, *, where: str, what: str) -> Sequence[Any]:
    """``value`` if it is a list with something in it. Raises CrfError."""
    if not isinstance(value, list | tuple) or not value:
        raise CrfError(f"{where}: {what} is needed, found {value!r}")
    return value


def check_keys(value: object, *, where: str, required: set[str], optional: set[str]) -> None:
    """Refuse a mapping that lacks a key or has one that nobody knows. Raises CrfError."""
    found = set(map(str, mapping(value, where=where)))
    if missing := required - found:
        raise CrfError(f"{where}: {', '.join(sorted(missing))} missing; add it")
    if unknown := found - required - optional:
        raise CrfError(
            f"{where}: unknown {', '.join(sorted(unknown))};"
            f" known are {', '.join(sorted(required | optional))}"
        )


def number(value: object, *, where: str) -> float:
    """A finite number. Raises CrfError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CrfError(f"{where}: a finite number is needed, found {value!r}")
    return float(value)


def moderate(value: object, *, where: str) -> float:
    """A number of at most ``MOST`` in size. Raises CrfError."""
    found = number(value, where=where)
    if abs(found) > MOST:
        raise CrfError(f"{where}: a number of at most {MOST:g} in size is needed, found {value!r}")
    return found


def positive(value: object, *, where: str) -> float:
    """A moderate number above 0. Raises CrfError."""
    found = moderate(value, where=where)
    if found <= 0:
        raise CrfError(f"{where}: a number above 0 is needed, found {value!r}")
    return found


def integer(value: object, *, where: str, least: int) -> int:
    """A whole number of at least ``least``. Raises CrfError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CrfError(f"{where}: a whole number of at least {least} is needed, found {value!r}")
    return value
