"""Which settings of the appearance kernel are tried: first a grid, then around its best.

As the papers did it (DeepLab v1 section 5.1, v2 section 4.1.1): the other kernels stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from pipeline.crf.presets import without_preset
from pipeline.errors import CrfError


class Candidate(NamedTuple):
    """One setting of the kernel that has a guide."""

    weight: float

    position: float
    """In the unit of the CRF that is searched."""

    value: float
    """In 255ths of each band's range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchGrid:
    """Settings to try, each axis rising.

    >>> grid = SearchGrid(weight=(3.0, 4.0), position=(30.0,), value=(3.0, 5.0))
    >>> len(grid.coarse()), grid.fine(Candidate(3.0, 30.0, 5.0))[0]
    (4, Candidate(weight=2.5, position=30.0, value=4.0))
    """

    weight: tuple[float, ...]
    position: tuple[float, ...]
    value: tuple[float, ...]

    def __post_init__(self) -> None:
        for axis in (self.weight, self.position, self.value):
            if not axis or min(axis) <= 0 or list(axis) != sorted(set(axis)):
                raise CrfError(f"a grid needs rising numbers above 0 on each axis, got {axis}")

    def coarse(self) -> list[Candidate]:
        """The whole grid."""
        axes = itertools.product(self.weight, self.position, self.value)
        return [Candidate(*values) for values in axes]

    def fine(self, best: Candidate) -> list[Candidate]:
        """Half a step around the best on each axis; the best itself is left out."""
        axes = [
            _around(axis, value)
            for axis, value in zip((self.weight, self.position, self.value), best, strict=True)
        ]
        around = [Candidate(*values) for values in itertools.product(*axes)]
        return [candidate for candidate in around if candidate != best]


FIRST_GRIDS = MappingProxyType(
    {
        "v1": SearchGrid(
            weight=(5, 6, 7, 8, 9, 10),
            position=(50, 60, 70, 80, 90, 100),
            value=(3, 4, 5, 6, 7, 8, 9, 10),
        ),
        "v2": SearchGrid(
            weight=(3, 4, 5, 6),
            position=(30, 40, 50, 60, 70, 80, 90, 100),
            value=(3, 4, 5, 6),
        ),
    }
)
"""The papers' own first grids."""


def with_candidate(crf: Mapping[str, Any], candidate: Candidate) -> dict[str, Any]:
    """The ``crf`` part with that setting of the one kernel that has a guide; a new mapping.

    Raises CrfError where there is no such kernel, or several, or one of several deviations.
    """
    spelt = dict(without_preset(crf))
    kernels: list[Any] = list(spelt.get("kernels", [spelt.get("appearance")]))
    guided = [
        n for n, kernel in enumerate(kernels) if isinstance(kernel, Mapping) and "bands" in kernel
    ]
    if len(guided) != 1:
        raise CrfError(f"crf: one kernel with guide bands is needed to tune, found {len(guided)}")
    kernel = dict(kernels[guided[0]])
    name = next((key for key in kernel if key.startswith("position")), "position")
    if isinstance(kernel.get(name), Sequence):
        raise CrfError(f"crf: tuning takes one deviation for all axes, found {kernel[name]}")
    kernel |= {"weight": candidate.weight, name: candidate.position, "value": candidate.value}
    kernels[guided[0]] = kernel
    return spelt | ({"kernels": kernels} if "kernels" in spelt else {"appearance": kernel})


def _around(axis: tuple[float, ...], value: float) -> list[float]:
    """A value and the places half a step below and above; an axis of one value is left alone."""
    if len(axis) == 1:
        return [value]
    at = axis.index(value)
    before = axis[at - 1] if at else 2 * axis[0] - axis[1]
    after = axis[at + 1] if at + 1 < len(axis) else 2 * axis[-1] - axis[-2]
    return [place for place in ((before + value) / 2, value, (value + after) / 2) if place > 0]
