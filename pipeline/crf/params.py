"""What the dense CRF is told: kernels with units, and what they come to on one image's grid."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from pipeline.crf.checked import check_keys, integer, mapping, moderate, number, positive, sequence
from pipeline.crf.engine import EngineName
from pipeline.crf.native_engine import MOST_CLASSES, MOST_FEATURES
from pipeline.crf.presets import OTHERS, without_preset
from pipeline.domain import Halo, Shape
from pipeline.errors import CrfError

Unit = Literal["px", "m", "mm"]

Scope = Literal["tile", "scene"]
"""``tile``: a lattice for each tile and its halo. ``scene``: one under all tiles."""

GUIDE_MAX = 255.0
"""Guide bands are scaled from their stated range to [0, GUIDE_MAX] before anything else."""

ITERATIONS = 10
"""As in all of the papers, where nothing else is asked."""

_PLACED = 2**20
"""Deviations from the scene's first pixel, or from a guide's least value, that engines can place.

Features are float32: further away they are rounded to more than an eighth of a deviation.
"""

_KEY_MAX = 32767
"""pydensecrf holds the coordinates of a lattice vertex as int16."""

_POSITION_UNITS: dict[str, Unit] = {"position": "px", "position_m": "m", "position_mm": "mm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """The bands whose likeness the appearance kernel looks at."""

    bands: tuple[str, ...]

    value: tuple[float, ...]
    """Standard deviation of each band's values after scaling, in 255ths of its ``range``."""

    range: tuple[tuple[float, float], ...]
    """Values of a band that become 0 and 255; those outside are clipped, as in an 8-bit image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A Gaussian over position, and over guide bands where it has a guide."""

    weight: float

    position: tuple[float, ...]
    """Standard deviation in ``unit``: one for all axes, or one per axis (y, x) or (z, y, x)."""

    unit: Unit

    guide: Guide | None = None

    def position_px(self, spacing: Sequence[float], *, unit: Unit) -> tuple[float, ...]:
        """Deviation per axis in pixels, for an image with ``spacing`` in ``unit``."""
        if len(self.position) not in (1, len(spacing)):
            raise CrfError(
                f"crf: {len(self.position)} position deviations {self.position} for an image of"
                f" {len(spacing)} axes; give one number, or one per axis"
            )
        deviations = self.position * (len(spacing) // len(self.position))
        if self.unit == "px":
            return deviations
        if self.unit != unit:
            raise CrfError(
                f"crf: the position deviation is in {self.unit} but the image's pixel size is in"
                f" {unit}; give it in {unit}, or in px as 'position'"
            )
        return tuple(d / s for d, s in zip(deviations, spacing, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedKernel:
    """A kernel on the grid of one image."""

    weight: float

    position_px: tuple[float, ...]
    """Standard deviation per axis (y, x) or (z, y, x), in pixels."""

    guide: Guide | None

    channels: tuple[int, ...]
    """Index of each guide band among the image's channels; empty without a guide."""

    def key_reach(self, shape: Shape) -> float:
        """Upper bound of the lattice coordinates that a scene of ``shape`` needs.

        The permutohedral embedding scales feature k (from 1) of d by
        sqrt(2/3)(d+1)/sqrt(k(k+1)) to c_k; coordinate j, from 0, is c_{j+1} + .. + c_d - j c_j,
        and the last one is not stored. Rounding to the simplex, its vertices and their neighbours
        add the rest. Features start at 0, so the bound needs their greatest value only.
        """
        greatest = self.greatest(shape)
        d = len(greatest)
        unit = math.sqrt(2 / 3) * (d + 1)
        scaled = [top * unit / math.sqrt(k * (k + 1)) for k, top in enumerate(greatest, start=1)]
        negative = max(k * c for k, c in enumerate(scaled[: d - 1], start=1))
        return max(sum(scaled), negative) + 1.5 * (d + 1) + 2 * d

    def greatest(self, shape: Shape) -> list[float]:
        """Of each feature on a scene of ``shape``, in deviations: x, y(, z), then guide bands.

        The least is 0.
        """
        greatest = [(n - 1) / s for n, s in zip(shape, self.position_px, strict=True)][::-1]
        if self.guide is not None:
            greatest += [GUIDE_MAX / value for value in self.guide.value]
        return greatest


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedCrf:
    """The whole CRF on the grid of one image: what ``refine`` needs."""

    engine: EngineName | Literal["auto"]
    """As asked; a plan replaces ``auto`` by what it became."""

    iterations: int
    kernels: tuple[ResolvedKernel, ...]

    halo_px: Halo
    """Context of the CRF around a core, on top of the network's, in pixels."""

    compatibility: tuple[tuple[float, ...], ...] | None
    """Cost of each pair of classes, times a kernel's weight; None: 1 where they differ (Potts)."""

    scope: Scope = "tile"

    def as_json(self) -> dict[str, Any]:
        """All that decides the result; the scope only where it is not the tile."""
        values = asdict(self)
        if self.scope == "tile":
            del values["scope"]
        return values

    def check_classes(self, count: int) -> None:
        """Refuse a matrix of another number of classes, or more than the engine takes.

        Raises CrfError.
        """
        if self.engine == "native" and count > MOST_CLASSES:
            raise CrfError(
                f"crf: {count} classes, the native engine takes {MOST_CLASSES}: ask for the engine"
                " torch or pydensecrf"
            )
        if self.compatibility is not None and len(self.compatibility) != count:
            raise CrfError(
                f"crf.compatibility: {len(self.compatibility)} rows, there are {count} classes;"
                " give a row and a column for each, in their order"
            )

    def check_extent(self, shape: Shape) -> None:
        """Refuse a scene of ``shape`` whose far corner the engine cannot address.

        Raises:
            CrfError: naming the longest side that this CRF reaches, or what else is too much.
        """
        for kernel in self.kernels:
            features = len(kernel.greatest(shape))
            if self.engine == "native" and features > MOST_FEATURES:
                raise CrfError(
                    f"crf: a kernel over {features} axes and bands, the native engine takes"
                    f" {MOST_FEATURES}: name fewer bands, or ask for the engine torch"
                )
            if (span := max(kernel.greatest(shape))) > _PLACED:
                raise CrfError(
                    f"crf: a scene of {' x '.join(map(str, shape))} px, or a guide's range, spans"
                    f" {span:.2g} deviations, 2^20 can be told apart: give larger"
                    " deviations"
                )
        if self.engine != "pydensecrf":
            return
        for kernel in self.kernels:
            if kernel.key_reach(shape) <= _KEY_MAX:
                continue
            limit = bisect.bisect_left(
                range(1, max(shape) + 1),
                True,
                key=lambda side: kernel.key_reach(tuple(min(n, side) for n in shape)) > _KEY_MAX,
            )
            raise CrfError(
                f"crf: a scene of {' x '.join(map(str, shape))} px is beyond pydensecrf's int16 key"
                f" range: a deviation of {', '.join(f'{p:g}' for p in kernel.position_px)} px"
                f" reaches {limit} px a side; use the native engine, or a larger deviation"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CrfParams:
    """The ``crf`` part of a bundle, checked."""

    engine: EngineName | Literal["auto"]
    iterations: int
    kernels: tuple[Kernel, ...]

    halo: int | None
    """Pixels of context per side; None for twice the largest position deviation, or for none
    where the scope is the scene."""

    compatibility: tuple[tuple[float, ...], ...] | None = None
    """Cost of each pair of classes, symmetric, in the classes' order; None for Potts."""

    scope: Scope = "tile"

    @classmethod
    def from_mapping(cls, crf: Mapping[str, Any]) -> CrfParams:
        """Check the ``crf`` part of ``model.yaml``, or the whole of a ``--crf`` file.

        Kernels are given as ``smoothness`` and ``appearance``, as a list ``kernels``, or by the
        name of a ``preset``.

        Raises:
            CrfError: a key is missing or unknown, or a value is not what it should be.
        """
        spelt = without_preset(mapping(crf, where="crf"))
        named = {"kernels"} if "kernels" in spelt else {"smoothness", "appearance"}
        check_keys(spelt, where="crf", required=set(), optional=named | OTHERS)
        halo, matrix = spelt.get("halo"), spelt.get("compatibility")
        scope = _scope(spelt)
        return cls(
            engine="native" if scope == "scene" else _engine(spelt.get("engine", "auto")),
            iterations=integer(
                spelt.get("iterations", ITERATIONS), where="crf.iterations", least=1
            ),
            kernels=_kernels(spelt),
            halo=None if halo is None else integer(halo, where="crf.halo", least=0),
            compatibility=None if matrix is None else _compatibility(matrix),
            scope=scope,
        )

    def resolve(
        self, spacing: Sequence[float], *, unit: Unit, channels: Sequence[str]
    ) -> ResolvedCrf:
        """Say what this CRF is on an image with ``spacing`` in ``unit`` and these ``channels``.

        Args:
            spacing: pixel size per axis, (y, x) or (z, y, x).
            unit: unit of ``spacing``; ``px`` where the image has no physical size.
            channels: names of the channels of the guide array, in its order.

        Raises:
            CrfError: a guide band is missing, or a deviation does not fit axes or unit.
        """
        kernels = tuple(
            ResolvedKernel(
                weight=kernel.weight,
                position_px=kernel.position_px(spacing, unit=unit),
                guide=kernel.guide,
                channels=_channels(kernel.guide, channels),
            )
            for kernel in self.kernels
        )
        widest = [max(axis) for axis in zip(*(k.position_px for k in kernels), strict=True)]
        usual = [0 if self.scope == "scene" else math.ceil(2 * w) for w in widest]
        widths = tuple(width if self.halo is None else self.halo for width in usual)
        return ResolvedCrf(
            engine=self.engine,
            iterations=self.iterations,
            kernels=kernels,
            halo_px=Halo(widths, widths),
            compatibility=self.compatibility,
            scope=self.scope,
        )


def _engine(value: object) -> Any:
    known = ("auto", *get_args(EngineName))
    if value not in known:
        raise CrfError(f"crf.engine: one of {', '.join(known)} is needed, found {value!r}")
    return value


def _scope(crf: Mapping[str, Any]) -> Scope:
    """One lattice under the scene has no halo, and one engine alone keeps it."""
    scope = crf.get("scope", "tile")
    if scope not in get_args(Scope):
        raise CrfError(f"crf.scope: one of {', '.join(get_args(Scope))} is needed, found {scope!r}")
    for key, meant in (("engine", ("auto", "native")), ("halo", (None,))):
        if scope == "scene" and key in crf and crf[key] not in meant:
            raise CrfError(
                f"crf.{key}: {crf[key]!r} asked with scope scene: one lattice of the native engine"
                f" lies under all tiles, without a halo; leave {key} out"
            )
    return cast(Scope, scope)


def _channels(guide: Guide | None, channels: Sequence[str]) -> tuple[int, ...]:
    if guide is None:
        return ()
    if not set(guide.bands) <= set(channels):
        raise CrfError(
            f"crf: guide bands {', '.join(guide.bands)} asked, the image has"
            f" {', '.join(channels)}; name bands that it has, or use --crf off"
        )
    return tuple(channels.index(band) for band in guide.bands)


def _kernels(crf: Mapping[str, Any]) -> tuple[Kernel, ...]:
    if "kernels" in crf:
        listed = sequence(crf["kernels"], where="crf.kernels", what="a list of kernels")
        return tuple(
            _kernel(
                kernel,
                where=f"crf.kernels[{n}]",
                guided="bands" in mapping(kernel, where=f"crf.kernels[{n}]"),
            )
            for n, kernel in enumerate(listed)
        )
    kernels = tuple(
        _kernel(crf[name], where=f"crf.{name}", guided=name == "appearance")
        for name in ("smoothness", "appearance")
        if name in crf
    )
    if not kernels:
        raise CrfError("crf: no kernel found; give 'smoothness', 'appearance' or both")
    return kernels


def _kernel(value: object, *, where: str, guided: bool) -> Kernel:
    checked = mapping(value, where=where)
    named = [key for key in _POSITION_UNITS if key in checked]
    if len(named) != 1:
        raise CrfError(
            f"{where}: exactly one of {', '.join(_POSITION_UNITS)} is needed,"
            f" found {', '.join(named) or 'none'}"
        )
    guide_keys = {"value", "bands", "range"} if guided else set()
    check_keys(checked, where=where, required={"weight", named[0]} | guide_keys, optional=set())
    place = f"{where}.{named[0]}"
    return Kernel(
        weight=positive(checked["weight"], where=f"{where}.weight"),
        position=tuple(positive(part, where=place) for part in _each(checked[named[0]])),
        unit=_POSITION_UNITS[named[0]],
        guide=_guide(checked, where=where) if guided else None,
    )


def _guide(kernel: Mapping[str, Any], *, where: str) -> Guide:
    bands = sequence(kernel["bands"], where=f"{where}.bands", what="a list of band names")
    values = _per_band(_each(kernel["value"]), bands, where=f"{where}.value")
    limits = kernel["range"]
    several = isinstance(limits, list | tuple) and any(isinstance(p, list | tuple) for p in limits)
    limits = _per_band(limits if several else [limits], bands, where=f"{where}.range")
    return Guide(
        bands=tuple(str(band) for band in bands),
        value=tuple(positive(value, where=f"{where}.value") for value in values),
        range=tuple(_limits(pair, where=f"{where}.range") for pair in limits),
    )


def _limits(pair: object, *, where: str) -> tuple[float, float]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise CrfError(f"{where}: two numbers [low, high] are needed, found {pair!r}")
    low, high = (number(limit, where=where) for limit in pair)
    if low >= high:
        raise CrfError(f"{where}: low must be below high, found {pair!r}")
    return low, high


def _each(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) and value else [value]


def _per_band(values: Sequence[Any], bands: Sequence[Any], *, where: str) -> Sequence[Any]:
    """One value for each band; a single one stands for all."""
    if len(values) not in (1, len(bands)):
        raise CrfError(
            f"{where}: {len(values)} given for {len(bands)} bands; give one, or one each"
        )
    return values if len(values) == len(bands) else list(values) * len(bands)


def _compatibility(value: object) -> tuple[tuple[float, ...], ...]:
    where = "crf.compatibility"
    rows = [
        sequence(row, where=where, what="a list of rows")
        for row in sequence(value, where=where, what="a list of rows")
    ]
    matrix = tuple(tuple(moderate(cost, where=where) for cost in row) for row in rows)
    if any(len(row) != len(matrix) for row in matrix) or matrix != tuple(zip(*matrix, strict=True)):
        raise CrfError(
            f"{where}: as many columns as rows, and symmetric, is needed; found {value!r}"
        )
    return matrix
