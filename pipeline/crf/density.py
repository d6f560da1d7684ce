"""How densely an image fills the lattice of a CRF."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MARGIN = 1.25
"""A tile may have so many times the vertices of the densest place that was looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Density:
    """Vertices a pixel, the most that any place has: smaller ones have more, for their borders.

    >>> Density(runs=((2.0, 1.5, 1.2, 1.1),), places=4).touched(0, rows=3)
    1.5
    """

    runs: tuple[tuple[float, ...], ...]
    """Of each kernel, touched by runs of 1, 2, 4, .. rows, each run counted apart; the last is of
    all rows of a place."""

    places: int
    """Of the image, that were counted; 0 where none could be, and noise was."""

    def vertices(self, kernel: int) -> float:
        """Of a kernel, for each pixel."""
        return self.runs[kernel][-1]

    def touched(self, kernel: int, *, rows: int) -> float:
        """The same, a vertex counted for each run of at most so many rows that touches it."""
        return self.runs[kernel][min(max(rows, 1).bit_length(), len(self.runs[kernel])) - 1]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of it."""
        if self.places:
            return ()
        return ("no place of the image could be counted: the CRF's memory is that of noise",)

    def as_json(self) -> dict[str, Any]:
        """What the plan assumes."""
        vertices = [round(self.vertices(kernel), 3) for kernel in range(len(self.runs))]
        return {"vertices_per_pixel": vertices, "places": self.places, "margin": MARGIN}
