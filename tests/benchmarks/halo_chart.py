"""A chart of shares against halos: powers of ten over powers of two."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = (1120, 640)
PLOT = (110, 40, 760, 560)
"""Left, top, right, bottom, in px."""

DECADES = (-7, -1)
"""Powers of ten at bottom and top; no labels at all lie on the bottom line."""

HALOS = (0, 4, 8, 16, 32, 64, 128, 256)
"""What the axis is marked with; 0 stands where 2 would."""

COLORS = ("#1d4ed8", "#c2410c", "#15803d", "#a21caf", "#0f172a", "#d97706")
Pen = ImageDraw.ImageDraw


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """How tiles fared with halos of growing width."""

    name: str

    shares: Mapping[int, float]
    """Of labels that differ, by the halo in px."""

    usual: int
    """The halo that is taken where none is asked for."""


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Write the chart as a PNG of few colours; a ring marks the usual halo."""
    sheet = Image.new("RGB", SIZE, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=17)
    _frame(pen)
    for number, (curve, color) in enumerate(zip(curves, COLORS, strict=False)):
        places = {halo: (_x(halo), _y(share)) for halo, share in curve.shares.items()}
        pen.line(list(places.values()), fill=color, width=3)
        for halo, (x, y) in places.items():
            if halo == curve.usual:
                pen.ellipse((x - 8, y - 8, x + 8, y + 8), fill="white", outline=color, width=3)
            else:
                pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=color)
        left, row = PLOT[2] + 25, PLOT[1] + 10 + 34 * number
        pen.line((left, row + 10, left + 35, row + 10), fill=color, width=4)
        pen.text((left + 45, row), curve.name, fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(64).save(path, optimize=True)


def _x(halo: int) -> float:
    left, right = PLOT[0] + 20, PLOT[2] - 20
    return left + (right - left) * (math.log2(max(halo, 2)) - 1) / (math.log2(HALOS[-1]) - 1)


def _y(share: float) -> float:
    _, top, _, bottom = PLOT
    low, high = DECADES
    power = min(max(math.log10(max(share, 10.0**low)), low), high)
    return bottom - (bottom - top) * (power - low) / (high - low)


def _frame(pen: Pen) -> None:
    """Axes, their lines and what they say."""
    left, top, right, bottom = PLOT
    font = ImageFont.load_default(size=17)
    for power in range(DECADES[0], DECADES[1] + 1):
        y = _y(10.0**power)
        pen.line((left, y, right, y), fill="#d4d4d8")
        percent = f"{100 * 10.0**power:.6f}".rstrip("0").rstrip(".")
        text = "none" if power == DECADES[0] else f"{percent} %"
        pen.text((left - 8, y), text, fill="black", font=font, anchor="rm")
    for halo in HALOS:
        x = _x(halo)
        pen.line((x, bottom, x, bottom + 6), fill="black")
        pen.text((x, bottom + 10), str(halo), fill="black", font=font, anchor="mt")
    pen.rectangle(PLOT, outline="black")
    below = ((left + right) / 2, bottom + 40)
    text = "halo of the CRF, px (ring: where none is asked for)"
    pen.text(below, text, fill="black", font=font, anchor="mt")
    pen.text((left, top - 8), "labels unlike one piece", fill="black", font=font, anchor="lb")
