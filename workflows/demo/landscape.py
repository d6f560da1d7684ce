"""An endless generated landscape, seen by a satellite: four bands at 10 m, and what is there.

Every pixel is a function of its own coordinates and the seed, so that any block is computed alone.
Reflectances are fractions of 1 until the sensor scales them. Axes: C channel, S space (y, x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.domain import Halo, Region
from workflows.demo.noise import Floats, Ints, cells, fractal, hashed, normal, strips, uniform

BANDS = ("blue", "green", "red", "nir")
CLASSES = ("water", "forest", "healthy crop", "diseased crop", "bare soil", "built")
COLORS = ("#2b6cb0", "#276749", "#a3c76d", "#d53f8c", "#b7895b", "#718096")
IGNORED = 255
"""Truth where a cloud hides the ground."""

NODATA = 0
"""Image value where a cloud hides the ground."""

WATER, FOREST, CROP, DISEASE, SOIL, BUILT = range(6)

_SPECTRA = {
    "dense": (0.032, 0.068, 0.040, 0.43),
    "meadow": (0.040, 0.080, 0.055, 0.34),
    "ripe": (0.065, 0.110, 0.130, 0.27),
    "soil": (0.085, 0.115, 0.150, 0.205),
    "stubble": (0.085, 0.130, 0.165, 0.250),
    "sick": (0.070, 0.095, 0.125, 0.195),
    "leaf": (0.024, 0.050, 0.030, 0.36),
    "needle": (0.018, 0.034, 0.023, 0.22),
    "clear": (0.050, 0.048, 0.028, 0.016),
    "silt": (0.070, 0.085, 0.070, 0.035),
    "street": (0.115, 0.125, 0.135, 0.170),
    "roof": (0.120, 0.125, 0.165, 0.215),
    "white": (0.290, 0.300, 0.310, 0.340),
    "verge": (0.050, 0.085, 0.075, 0.29),
}
"""Reflectance (blue, green, red, nir) of pure covers, in midsummer."""


Labelled = tuple[NDArray[Any], NDArray[np.uint8]]
"""An image (C, *S) as a sensor delivers it, and the class ids (*S) of its pixels."""


@dataclass(slots=True, eq=False)
class Ground:
    """What lies at each pixel; painted over cover by cover, from the fields up."""

    image_CS: Floats
    """(4, *S) float32: reflectance."""

    label_S: NDArray[np.uint8]
    """(*S) uint8: class ids."""

    def paint(self, where_S: NDArray[np.bool_], image_CS: Floats, label: int) -> None:
        """Lay a cover of one class over the pixels ``where_S``."""
        np.copyto(self.image_CS, image_CS, where=where_S)
        self.label_S[where_S] = label


def render(region: Region, *, seed: int) -> Labelled:
    """Image (4, *S) uint16 reflectance x 10000 and class ids (*S) uint8 of a region; new arrays.

    Blocks of any cutting fit together without a seam. Clouded pixels are NODATA and IGNORED.
    """
    # Each layer adds its own number to the seed; hashed first, or neighbouring seeds share layers.
    seed = int(hashed(np.array([seed & 0xFFFFFFFF], np.uint32))[0] >> 8)
    seen = region.grow(Halo.uniform(1, ndim=2))
    y, x = _coordinates(seen)
    ground = _fields(y, x, seed=seed)
    _woods(ground, y, x, seed=seed)
    _roads(ground, y, x, seed=seed)
    _settlements(ground, y, x, seed=seed)
    _waters(ground, y, x, seed=seed)
    relief_S = 1 + np.float32(0.06) * fractal(y, x, scale=500, octaves=4, seed=seed + 70)
    image_CS = _blurred(ground.image_CS * relief_S)
    y, x, label_S = y[1:-1], x[:, 1:-1], ground.label_S[1:-1, 1:-1].copy()
    clouded_S = _sky(image_CS, y, x, seed=seed)
    for band in range(len(BANDS)):
        grain_S = normal(_keys(y), _keys(x), seed * 8 + band)
        image_CS[band] *= 1 + np.float32(0.02) * grain_S
        image_CS[band] += np.float32(0.0015) * grain_S
    scaled_CS = np.clip(image_CS * 10000, 1, 65535).astype(np.uint16)
    scaled_CS[:, clouded_S] = NODATA
    label_S[clouded_S] = IGNORED
    return scaled_CS, label_S


def scattered(count: int, *, side: int, seed: int) -> list[Labelled]:
    """``render`` at ``count`` places of a landscape, far apart, ``side`` pixels square."""
    corners = np.random.default_rng(seed).integers(0, 90_000, (count, 2)).tolist()
    return [render(Region((y, x), (y + side, x + side)), seed=seed) for y, x in corners]


def _coordinates(region: Region) -> tuple[Floats, Floats]:
    (top, left), (bottom, right) = region.start, region.stop
    y = np.arange(top, bottom, dtype=np.float32)
    x = np.arange(left, right, dtype=np.float32)
    return y[:, None], x[None, :]


def _keys(t_S: Floats) -> Ints:
    return t_S.astype(np.int32).view(np.uint32)


def _cover(*names: str, shares: tuple[Floats, ...] = ()) -> Floats:
    """The first spectrum, mixed in turn with each following one by its share (*S) in [0, 1]."""
    spectra = [np.array(_SPECTRA[name], np.float32)[:, None, None] for name in names]
    image_CS = spectra[0]
    for spectrum, share_S in zip(spectra[1:], shares, strict=True):
        image_CS = image_CS + (spectrum - image_CS) * share_S
    return image_CS


def _step(t_S: Floats, *, width: float) -> Floats:
    """0 to 1 as ``t_S`` rises through zero, over about ``width``."""
    soft_S: Floats = np.clip(t_S / np.float32(width) + np.float32(0.5), 0, 1)
    return soft_S * soft_S * (3 - 2 * soft_S)


def _fields(y: Floats, x: Floats, *, seed: int) -> Ground:
    """Parcels in the directions of their farms: crops of all ages, bare and stubble fields."""
    warp_y = 14 * fractal(y, x, scale=260, octaves=2, seed=seed + 1)
    warp_x = 14 * fractal(y, x, scale=260, octaves=2, seed=seed + 2)
    farm = cells(y + warp_y, x + warp_x, scale=170, seed=seed + 3)
    angle = np.float32(np.pi) * uniform(farm.id_S, 4)
    along_S = np.cos(angle) * farm.dy_S + np.sin(angle) * farm.dx_S
    across_S = np.cos(angle) * farm.dx_S - np.sin(angle) * farm.dy_S
    width_S = 11 + 30 * uniform(farm.id_S, 5) ** 2
    length_S = width_S * (1.5 + 2.5 * uniform(farm.id_S, 6))
    strip_S, side_S = strips(across_S / width_S, name_S=farm.id_S, seed=7)
    row_S = hashed(farm.id_S, strip_S)
    piece_S, end_S = strips(along_S / length_S + uniform(row_S, 8), name_S=row_S, seed=9)
    parcel_S = hashed(row_S, piece_S)
    edge_S = np.minimum(np.minimum(side_S * width_S, end_S * length_S), farm.edge_S)
    ground = _grown(y, x, parcel_S, across_S, seed=seed)
    verge_S = 0.75 * (1 - _step(edge_S - 0.9, width=1.0))
    track_S = 0.8 * (1 - _step(np.abs(farm.edge_S - 1.2) - 0.7, width=0.8))
    ground.image_CS += (_cover("verge") - ground.image_CS) * verge_S
    ground.image_CS += (_cover("street") - ground.image_CS) * track_S
    return ground


def _grown(y: Floats, x: Floats, parcel_S: Ints, across_S: Floats, *, seed: int) -> Ground:
    """What stands on each parcel; disease is a patch within a parcel, not a parcel of its own."""
    kind_S, age_S = uniform(parcel_S, 1), uniform(parcel_S, 2)
    # Rows and tramlines run along the parcel; only here is the landscape that regular.
    period_S = 2.6 + 2.0 * uniform(parcel_S, 3)
    rows_S = np.sin(across_S * (2 * np.pi / period_S)).astype(np.float32)
    mottle_S = fractal(y, x, scale=9, octaves=3, seed=seed + 10)
    drift_S = fractal(y, x, scale=60, octaves=3, seed=seed + 11)
    cover_S = np.clip(0.25 + 0.9 * age_S + 0.05 * rows_S * (1.4 - age_S) + 0.04 * drift_S, 0, 1)
    crop_CS = _cover("soil", "dense", shares=(cover_S,))
    ripe_S = (kind_S > 0.45) & (kind_S < 0.62)
    np.copyto(crop_CS, _cover("dense", "ripe", shares=(np.sqrt(age_S),)), where=ripe_S)
    meadow_S = (kind_S >= 0.62) & (kind_S < 0.74)
    np.copyto(crop_CS, _cover("meadow", "dense", shares=(0.3 * age_S,)), where=meadow_S)
    crop_CS *= 1 + np.float32(0.025) * drift_S + np.float32(0.02) * rows_S
    sick_S = _disease(y, x, seed=seed) * ((kind_S < 0.45) & (age_S > 0.4))
    wilt_S = sick_S * (0.80 + 0.16 * mottle_S)
    crop_CS += (_cover("sick") - crop_CS) * np.clip(wilt_S, 0, 1)
    bare_S = kind_S >= 0.80
    soil_CS = _cover("soil", "stubble", shares=((kind_S > 0.9) * age_S,))
    soil_CS = soil_CS * (0.75 + 0.45 * age_S + 0.05 * drift_S + 0.04 * rows_S)
    weeds_S = np.clip(0.16 * mottle_S - 0.05, 0, 0.5)
    soil_CS += (_cover("meadow") - soil_CS) * weeds_S
    crop_CS *= 0.90 + 0.2 * uniform(parcel_S, 4)
    label_S = np.where(sick_S > 0.5, DISEASE, CROP).astype(np.uint8)
    ground = Ground(crop_CS, label_S)
    ground.paint(bare_S, soil_CS, SOIL)
    return ground


def _disease(y: Floats, x: Floats, *, seed: int) -> Floats:
    """Severity 0..1 on a host: it spreads in patches from foci, thinning outwards."""
    focus = cells(y, x, scale=420, seed=seed + 20)
    radius_S = 40 + 150 * uniform(focus.id_S, 21)
    reach_S = 1 - np.hypot(focus.dy_S, focus.dx_S) / radius_S
    active_S = uniform(focus.id_S, 22) < 0.75
    patches_S = fractal(y, x, scale=26, octaves=3, seed=seed + 23)
    severity_S = _step(reach_S + np.float32(0.30) * patches_S - np.float32(0.22), width=0.35)
    return severity_S * active_S


def _woods(ground: Ground, y: Floats, x: Floats, *, seed: int) -> None:
    """Forest with crowns that throw shade, broad-leaved and coniferous, and lone copses."""
    size_S = fractal(y, x, scale=520, octaves=7, seed=seed + 30)
    copse_S = fractal(y, x, scale=70, octaves=3, seed=seed + 31)
    where_S = (size_S > 0.8) | (copse_S > 2.0)
    crowns_S = fractal(y, x, scale=3.2, octaves=2, seed=seed + 32)
    stands_S = fractal(y, x, scale=110, octaves=3, seed=seed + 33)
    image_CS = _cover("leaf", "needle", shares=(_step(stands_S, width=0.5),))
    image_CS = image_CS * np.clip(1 + 0.20 * crowns_S, 0.35, 1.6)
    ground.paint(where_S, image_CS, FOREST)


def _roads(ground: Ground, y: Floats, x: Floats, *, seed: int) -> None:
    """Highways that cross the land in two directions, with a green verge."""
    bend_S = 90 * fractal(y, x, scale=900, octaves=2, seed=seed + 40)
    for turn, (down, right) in enumerate(((0.92, 0.39), (-0.35, 0.94))):
        course_S = (down * y + right * x + bend_S) / 1100
        far_S = np.abs(course_S - np.floor(course_S) - 0.5) * 1100
        verge_S = far_S < 4.0
        ground.image_CS += (_cover("verge") - ground.image_CS) * (verge_S * np.float32(0.7))
        ground.paint(far_S < 2.3 - 0.5 * turn, _cover("street"), BUILT)


def _settlements(ground: Ground, y: Floats, x: Floats, *, seed: int) -> None:
    """Villages and towns: roofs, streets and gardens, with ragged edges; all of it is built."""
    town = cells(y, x, scale=640, seed=seed + 50)
    radius_S = 18 + 80 * uniform(town.id_S, 51) ** 3
    ragged_S = 9 * fractal(y, x, scale=28, octaves=2, seed=seed + 52)
    where_S = np.hypot(town.dy_S, town.dx_S) + ragged_S < radius_S
    angle = np.float32(np.pi) * uniform(town.id_S, 53)
    u_S = np.cos(angle) * town.dy_S + np.sin(angle) * town.dx_S
    v_S = np.cos(angle) * town.dx_S - np.sin(angle) * town.dy_S
    house_S = hashed(_keys(np.floor(u_S / 2.2)), _keys(np.floor(v_S / 2.6)), town.id_S)
    pick_S, shade_S = uniform(house_S, 54), uniform(house_S, 55)
    image_CS = _cover("verge", "roof", shares=((pick_S < 0.55).astype(np.float32),))
    np.copyto(image_CS, _cover("white"), where=pick_S < 0.06)
    image_CS *= 0.75 + 0.5 * shade_S
    street_S = (np.mod(u_S, 9.0) < 1.5) | (np.mod(v_S, 13.0) < 1.5)
    np.copyto(image_CS, _cover("street"), where=street_S)
    ground.paint(where_S, image_CS, BUILT)


def _waters(ground: Ground, y: Floats, x: Floats, *, seed: int) -> None:
    """Rivers that wind across the scene, each in its own valley, and lakes."""
    bend_S = 190 * fractal(y, x, scale=1000, octaves=3, seed=seed + 60)
    wind_S = 34 * fractal(y, x, scale=75, octaves=3, seed=seed + 61)
    course_S = (0.55 * y + 0.84 * x + bend_S + wind_S) / 1900
    wide_S = 7 + 3 * fractal(y, x, scale=400, octaves=2, seed=seed + 62)
    river_S = np.abs(course_S - np.floor(course_S) - 0.5) * 1900 - wide_S
    lake_S = (1.95 - fractal(y, x, scale=210, octaves=4, seed=seed + 63)) * 60
    far_S = np.minimum(river_S, lake_S)
    silt_S = np.clip(0.55 + 0.05 * far_S, 0, 1)
    ripple_S = fractal(y, x, scale=40, octaves=2, seed=seed + 64)
    image_CS = _cover("clear", "silt", shares=(silt_S,)) * (1 + np.float32(0.04) * ripple_S)
    bank_S = _step(5 - far_S, width=3) * np.float32(0.6)
    ground.image_CS += (_cover("leaf") - ground.image_CS) * bank_S
    ground.paint(far_S < 0, image_CS, WATER)


def _sky(image_CS: Floats, y: Floats, x: Floats, *, seed: int) -> NDArray[np.bool_]:
    """Lay cloud shadows and haze over the image, in place; True where cloud hides the ground."""

    def cloud(dy: float, dx: float) -> Floats:
        return fractal(y + dy, x + dx, scale=300, octaves=6, seed=seed + 80)

    shadow_S = _step(cloud(34, 46) - 1.72, width=0.30)
    image_CS *= 1 - np.array((0.42, 0.50, 0.55, 0.58), np.float32)[:, None, None] * shadow_S
    thick_S = cloud(0, 0)
    haze_S = np.float32(0.30) * _step(thick_S - 1.62, width=0.30)
    image_CS += (np.float32(0.45) - image_CS) * haze_S
    return thick_S > 1.70


def _blurred(image_CS: Floats) -> Floats:
    """The optics: pixels share light with their neighbours; the outermost pixels are lost."""
    side, own = np.float32(0.17), np.float32(0.66)
    rows: Floats = image_CS[:, 1:-1] * own + (image_CS[:, :-2] + image_CS[:, 2:]) * side
    blurred: Floats = rows[..., 1:-1] * own + (rows[..., :-2] + rows[..., 2:]) * side
    return blurred
