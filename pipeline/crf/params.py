"""What the dense CRF is told: kernels with units, and what they come to on one image's grid."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pipeline.crf.engine import EngineName
from pipeline.domain import Halo, Shape
from pipeline.errors import CrfError

Unit = Literal["px", "m", "mm"]

GUIDE_MAX = 255.0
"""Guide bands are scaled from their stated range to [0, GUIDE_MAX] before anything else."""

_KEY_MAX = 32767
"""pydensecrf holds the coordinates of a lattice vertex as int16."""

_POSITION_UNITS: dict[str, Unit] = {"position": "px", "position_m": "m", "position_mm": "mm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """The bands whose likeness the appearance kernel looks at."""

    value: float
    """Standard deviation of a guide value after scaling, in 255ths of ``range``."""

    bands: tuple[str, ...]

    range: tuple[float, float]
    """Values that become 0 and 255; those outside are clipped, as in an 8-bit image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A Gaussian over position, and over guide bands where it has a guide (Potts, any rank)."""

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
        greatest = [(n - 1) / s for n, s in zip(shape, self.position_px, strict=True)][::-1]
        if self.guide is not None:
            greatest += [GUIDE_MAX / self.guide.value] * len(self.channels)
        d = len(greatest)
        unit = math.sqrt(2 / 3) * (d + 1)
        scaled = [top * unit / math.sqrt(k * (k + 1)) for k, top in enumerate(greatest, start=1)]
        negative = max(k * c for k, c in enumerate(scaled[: d - 1], start=1))
        return max(sum(scaled), negative) + 1.5 * (d + 1) + 2 * d


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedCrf:
    """The whole CRF on the grid of one image: what ``refine`` needs."""

    engine: EngineName | Literal["auto"]
    """As asked; a plan replaces ``auto`` by what it became."""

    iterations: int
    kernels: tuple[ResolvedKernel, ...]

    halo_px: Halo
    """Context of the CRF around a core, on top of the network's, in pixels."""

    def check_extent(self, shape: Shape) -> None:
        """Refuse a scene of ``shape`` whose far corner the engine cannot address.

        Raises:
            CrfError: naming the longest side that this CRF reaches.
        """
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
    """Pixels of context per side; None for twice the largest position deviation."""

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> CrfParams:
        """Check the ``crf`` part of ``model.yaml``, or the whole of a ``--crf`` file.

        Raises:
            CrfError: a key is missing or unknown, or a value is not what it should be.
        """
        _check_keys(
            mapping,
            where="crf",
            required={"iterations"},
            optional={"smoothness", "appearance", "halo", "engine"},
        )
        kernels = tuple(
            _kernel(mapping[name], where=f"crf.{name}", guided=name == "appearance")
            for name in ("smoothness", "appearance")
            if name in mapping
        )
        if not kernels:
            raise CrfError("crf: no kernel found; give 'smoothness', 'appearance' or both")
        halo = mapping.get("halo")
        return cls(
            engine=_engine(mapping.get("engine", "auto")),
            iterations=_integer(mapping["iterations"], where="crf.iterations", least=1),
            kernels=kernels,
            halo=None if halo is None else _integer(halo, where="crf.halo", least=0),
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
        widths = tuple(math.ceil(2 * w) if self.halo is None else self.halo for w in widest)
        return ResolvedCrf(
            engine=self.engine,
            iterations=self.iterations,
            kernels=kernels,
            halo_px=Halo(widths, widths),
        )


def _engine(value: object) -> Any:
    known = ("auto", *get_args(EngineName))
    if value not in known:
        raise CrfError(f"crf.engine: one of {', '.join(known)} is needed, found {value!r}")
    return value


def _channels(guide: Guide | None, channels: Sequence[str]) -> tuple[int, ...]:
    if guide is None:
        return ()
    if not set(guide.bands) <= set(channels):
        raise CrfError(
            f"crf: guide bands {', '.join(guide.bands)} asked, the image has"
            f" {', '.join(channels)}; name bands that it has, or use --crf off"
        )
    return tuple(channels.index(band) for band in guide.bands)


def _kernel(mapping: object, *, where: str, guided: bool) -> Kernel:
    checked = _mapping(mapping, where=where)
    named = [key for key in _POSITION_UNITS if key in checked]
    if len(named) != 1:
        raise CrfError(
            f"{where}: exactly one of {', '.join(_POSITION_UNITS)} is needed,"
            f" found {', '.join(named) or 'none'}"
        )
    guide_keys = {"value", "bands", "range"} if guided else set()
    _check_keys(checked, where=where, required={"weight", named[0]} | guide_keys, optional=set())
    position = checked[named[0]]
    per_axis = position if isinstance(position, list | tuple) and position else [position]
    return Kernel(
        weight=_positive(checked["weight"], where=f"{where}.weight"),
        position=tuple(_positive(value, where=f"{where}.{named[0]}") for value in per_axis),
        unit=_POSITION_UNITS[named[0]],
        guide=_guide(checked, where=where) if guided else None,
    )


def _guide(mapping: Mapping[str, Any], *, where: str) -> Guide:
    bands, limits = mapping["bands"], mapping["range"]
    if not isinstance(bands, list | tuple) or not bands:
        raise CrfError(f"{where}.bands: a list of band names is needed, found {bands!r}")
    if not isinstance(limits, list | tuple) or len(limits) != 2:
        raise CrfError(f"{where}.range: two numbers [low, high] are needed, found {limits!r}")
    low, high = (_number(limit, where=f"{where}.range") for limit in limits)
    if low >= high:
        raise CrfError(f"{where}.range: low must be below high, found {limits!r}")
    return Guide(
        value=_positive(mapping["value"], where=f"{where}.value"),
        bands=tuple(str(band) for band in bands),
        range=(low, high),
    )


def _mapping(value: object, *, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CrfError(f"{where}: a mapping is needed, found {value!r}")
    return value


def _check_keys(value: object, *, where: str, required: set[str], optional: set[str]) -> None:
    found = set(map(str, _mapping(value, where=where)))
    if missing := required - found:
        raise CrfError(f"{where}: {', '.join(sorted(missing))} missing; add it")
    if unknown := found - required - optional:
        raise CrfError(
            f"{where}: unknown {', '.join(sorted(unknown))};"
            f" known are {', '.join(sorted(required | optional))}"
        )


def _number(value: object, *, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CrfError(f"{where}: a finite number is needed, found {value!r}")
    return float(value)


def _positive(value: object, *, where: str) -> float:
    number = _number(value, where=where)
    if number <= 0:
        raise CrfError(f"{where}: a number above 0 is needed, found {value!r}")
    return number


def _integer(value: object, *, where: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CrfError(f"{where}: a whole number of at least {least} is needed, found {value!r}")
    return value
