"""Whether slices are a regular volume, and where it lies; the verdict in millimetres where not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from highdicom.spatial import get_volume_positions
from numpy.typing import NDArray

from adapters.dicom_slice import SliceHeader
from pipeline.errors import SourceError

SPACING_RTOL = 0.01
"""Each gap between neighbours equals their mean but for this share of it."""

PERPENDICULAR_TOL = 1e-3
"""How far from 1 the cosine between the slice normal and the way from slice to slice may be."""

ORIENTATION_TOL = 1e-4
"""How far a direction cosine may differ between slices: writers round the last digits."""

SAME_PLACE_MM = 1e-3

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceStack:
    """Slices of one grid, in order along their normal: k counts slices, j rows, i columns."""

    slices: tuple[SliceHeader, ...]
    affine: tuple[float, ...]
    """16 numbers, row-major: ijk to the patient in mm, right-anterior-superior."""

    notes: tuple[str, ...]

    @property
    def shape_ijk(self) -> tuple[int, int, int]:
        """Columns, rows, slices."""
        rows, columns = self.slices[0].shape_YX
        return columns, rows, len(self.slices)


def stack_slices(slices: Sequence[SliceHeader], *, folder: Path) -> SliceStack:
    """Sort the slices along their normal, and prove that they are evenly spaced.

    Args:
        slices: at least one, in any order.
        folder: where they lie, for messages.

    Raises:
        SourceError: mixed grids, duplicates, a missing slice, uneven spacing, or gantry tilt.
    """
    for name, say in (
        ("shape_YX", "sizes (rows, columns)"),
        ("dtype", "pixel types"),
        ("frame_of_reference", "frames of reference"),
    ):
        found = sorted({getattr(header, name) for header in slices})
        if len(found) > 1:
            raise SourceError(f"{folder} mixes {len(found)} {say} in one series: {_few(found)}")
    _check_close(slices, "orientation", tolerance=ORIENTATION_TOL, folder=folder)
    _check_close(slices, "spacing_YX", tolerance=SAME_PLACE_MM, folder=folder)
    row, column = np.array(slices[0].orientation).reshape(2, 3)
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    ordered = sorted(slices, key=lambda header: float(normal @ header.position))
    positions = np.array([header.position for header in ordered])
    notes: tuple[str, ...] = ()
    if len(ordered) > 1:
        step = _regular_step(positions, normal, header=ordered[0], folder=folder)
    else:
        step, notes = _lone_step(ordered[0]), ("one slice: its thickness is taken for the spacing",)
    between_rows, between_columns = slices[0].spacing_YX
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * between_columns, column * between_rows
    affine[:3, 2], affine[:3, 3] = normal * step, positions[0]
    return SliceStack(
        slices=tuple(ordered),
        affine=tuple(float(a) for a in (LPS_TO_RAS @ affine).ravel()),
        notes=notes,
    )


def _check_close(
    slices: Sequence[SliceHeader], name: str, *, tolerance: float, folder: Path
) -> None:
    values = np.array([getattr(header, name) for header in slices])
    off = np.abs(values - values[0]).max(axis=1)
    if off.max() > tolerance:
        other = int(off.argmax())
        raise SourceError(
            f"{folder} mixes {name.removesuffix('_YX')} in one series: {slices[0].path.name} has"
            f" {getattr(slices[0], name)}, {slices[other].path.name}"
            f" {getattr(slices[other], name)}, tolerance {tolerance}"
        )


def _lone_step(header: SliceHeader) -> float:
    if header.thickness is None or header.thickness <= 0:
        raise SourceError(
            f"{header.path} is the only slice and has no slice thickness: the voxel's height is"
            " not known"
        )
    return header.thickness


def _regular_step(
    positions: NDArray[np.float64],
    normal: NDArray[np.float64],
    *,
    header: SliceHeader,
    folder: Path,
) -> float:
    """Distance between neighbours in mm; ``positions`` (N, 3) are in order along ``normal``."""
    along = (positions - positions[0]) @ normal
    _check_gaps(along, start=float(positions[0] @ normal), folder=folder)
    step = float(along[-1]) / (len(along) - 1)
    aside = np.linalg.norm(positions - positions[0] - np.outer(along, normal), axis=1)
    half_pixel = min(header.spacing_YX) / 2
    spacing, _ = get_volume_positions(
        positions.tolist(),
        header.orientation,
        rtol=SPACING_RTOL,
        perpendicular_tol=PERPENDICULAR_TOL,
        index_convention="RD",
    )
    # The cosine alone lets a long series lean by many pixels.
    if spacing is None or aside.max() > half_pixel:
        far = int(aside.argmax())
        tilt = np.degrees(np.arctan2(aside[far], along[far]))
        raise SourceError(
            f"{folder} has a gantry tilt or shifted slices: they lean {tilt:.2f} degrees from their"
            f" normal, {aside[far]:.3g} mm aside; tolerance {half_pixel:.3g} mm and a cosine within"
            f" {PERPENDICULAR_TOL}; resample the series first"
        )
    return step


def _check_gaps(along: NDArray[np.float64], *, start: float, folder: Path) -> None:
    """Refuse duplicates, missing slices and uneven gaps; ``along`` is sorted, in mm from 0."""
    gaps, places = np.diff(along), along + start
    if gaps.min() < SAME_PLACE_MM:
        at, count = places[int(gaps.argmin())], int((gaps < SAME_PLACE_MM).sum())
        raise SourceError(
            f"{folder} has more than one slice in {count} places, first at {at:.2f} mm along the"
            " normal: several times, echoes or copies in one series; keep one"
        )
    mean = float(gaps.mean())
    if np.allclose(gaps, mean, rtol=SPACING_RTOL, atol=0) and _stays(along, step=mean):
        return
    usual = float(np.median(gaps))
    wide = int(gaps.argmax())
    missing = np.rint(gaps / usual) - 1
    if missing.max() > 0 and np.allclose(gaps, (missing + 1) * usual, rtol=SPACING_RTOL, atol=0):
        raise SourceError(
            f"{folder} misses {int(missing.sum())} slices, {int(missing[wide])} of them between"
            f" {places[wide]:.2f} and {places[wide + 1]:.2f} mm along the normal, where others lie"
            f" {usual:.4g} mm apart; fetch them"
        )
    raise SourceError(
        f"{folder} has slices {gaps.min():.4g} to {gaps.max():.4g} mm apart, the widest gap at"
        f" {places[wide]:.2f} mm along the normal; tolerance {SPACING_RTOL:.0%} of {mean:.4g} mm;"
        " resample the series first"
    )


def _stays(along: NDArray[np.float64], *, step: float) -> bool:
    """Whether small differences do not add up: no slice is half a step from its place."""
    return bool(np.abs(along - np.arange(len(along)) * step).max() <= step / 2)


def _few(values: Sequence[object]) -> str:
    text = ", ".join(repr(value) for value in values[:3])
    return text if len(values) <= 3 else f"{text}, ..."
