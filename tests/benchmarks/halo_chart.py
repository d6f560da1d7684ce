"""A chart of shares against halos, both in powers of two or ten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = (1180, 700)
PLOT = (110, 40, 760, 610)
"""Left, top, right, bottom, in px."""

DECADES = (-6, -1)
"""Powers of ten at bottom and top; what is below, none above all, lies on the bottom line."""

COLORS = ("#1f4e9c", "#c2410c", "#2b6cb0", "#15803d", "#a21caf", "#0f766e", "#b45309", "#475569")


@dataclass(frozen=True, slots=True)
class _Axes:
    halos: Sequence[int]

    def x(self, halo: int) -> float:
        """Halos stand at equal distances."""
        left, _, right, _ = PLOT
        return left + 20 + (right - left - 40) * self.halos.index(halo) / (len(self.halos) - 1)

    def y(self, share: float) -> float:
        """Logarithmic, upwards."""
        _, top, _, bottom = PLOT
        low, high = DECADES
        power = np.clip(np.log10(max(share, 10.0**low)), low, high)
        return float(bottom - (bottom - top) * (power - low) / (high - low))


def draw(curves: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Share of labels that differ, of each curve and halo, as a PNG of few colours."""
    axes = _Axes(sorted({halo for curve in curves.values() for halo in curve}))
    sheet = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(sheet)
    _frame(pen, axes)
    font = ImageFont.load_default(size=17)
    for number, (name, curve) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        points = [(axes.x(halo), axes.y(share)) for halo, share in curve.items()]
        pen.line(points, fill=color, width=3)
        for x, y in points:
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=color)
        row = PLOT[1] + 10 + 34 * number
        pen.line((PLOT[2] + 25, row + 10, PLOT[2] + 60, row + 10), fill=color, width=4)
        pen.text((PLOT[2] + 70, row), name, fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(64).save(path, optimize=True)


def _frame(pen: ImageDraw.ImageDraw, axes: _Axes) -> None:
    """Axes, their lines and what they say."""
    left, top, right, bottom = PLOT
    font = ImageFont.load_default(size=17)
    for power in range(DECADES[0], DECADES[1] + 1):
        y = axes.y(10.0**power)
        pen.line((left, y, right, y), fill="#d4d4d8")
        text = "none" if power == DECADES[0] else f"{100 * 10.0**power:g} %"
        pen.text((left - 10, y), text, fill="black", font=font, anchor="rm")
    for halo in axes.halos:
        x = axes.x(halo)
        pen.line((x, bottom, x, bottom + 6), fill="black")
        pen.text((x, bottom + 10), str(halo), fill="black", font=font, anchor="mt")
    pen.rectangle(PLOT, outline="black")
    below = ((left + right) / 2, bottom + 40)
    pen.text(below, "halo of the CRF, px", fill="black", font=font, anchor="mt")
    pen.text((left, top - 8), "labels unlike one tile", fill="black", font=font, anchor="lb")
