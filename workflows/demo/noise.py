"""Randomness addressed by place: any block of an endless scene can be computed alone.

Coordinates are pixels of the whole scene, float32, rows before columns: ``y`` (rows, 1) and ``x``
(1, columns) of a block, or ``y_S`` and ``x_S`` of single places. Axes: S space, (y, x).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.uint32]


def hashed(*keys: Ints | int) -> Ints:
    """A 32-bit hash of integer keys, element by element; wraps around 2**32."""
    state = np.uint32(0x9E3779B9)
    mixed: Ints = np.asarray(state)
    for key in keys:
        value = np.asarray(key).astype(np.uint32) if isinstance(key, np.ndarray) else np.uint32(key)
        mixed = (mixed ^ value) * np.asarray(np.uint32(0x85EBCA6B))
        mixed ^= mixed >> np.uint32(15)
        mixed *= np.uint32(0x2C1B3C6D)
        mixed ^= mixed >> np.uint32(13)
    return mixed


def uniform(*keys: Ints | int) -> Floats:
    """Float32 in [0, 1) from integer keys."""
    share: Floats = (hashed(*keys) >> np.uint32(8)).astype(np.float32)
    share *= np.float32(2.0**-24)
    return share


def normal(*keys: Ints | int) -> Floats:
    """Float32 of mean 0 and deviation 1, from integer keys: a sum of four bytes, |x| < 3.5."""
    bits = hashed(*keys)
    total = np.zeros(bits.shape, np.float32)
    for shift in (0, 8, 16, 24):
        total += ((bits >> np.uint32(shift)) & np.uint32(255)).astype(np.float32)
    total -= np.float32(510.0)
    total *= np.float32(1 / 147.8)
    return total


def smooth_noise(y: Floats, x: Floats, *, scale: float, seed: int) -> Floats:
    """Smooth noise of mean 0: random values on a lattice of ``scale`` px under cubic B-splines.

    Args:
        y: (rows, 1) float32, the coordinates of the rows.
        x: (1, columns) float32, the coordinates of the columns.
        scale: Distance of the lattice points, in pixels; features are about twice as wide.
        seed: Which noise.

    Returns:
        (rows, columns) float32 in [-1, 1], of deviation 0.277.
    """
    rows, weights_y = _splines(y.ravel(), scale)
    columns, weights_x = _splines(x.ravel(), scale)
    top, left = int(rows[0]), int(columns[0])
    table = 2 * uniform(
        np.arange(top, int(rows[-1]) + 4, dtype=np.int32).view(np.uint32)[:, None],
        np.arange(left, int(columns[-1]) + 4, dtype=np.int32).view(np.uint32)[None, :],
        seed,
    )
    table -= 1
    bands = sum(table[rows - top + tap] * w[:, None] for tap, w in enumerate(weights_y))
    noise_S = np.zeros((y.size, x.size), np.float32)
    for tap, weight in enumerate(weights_x):
        noise_S += np.take(bands, columns - left + tap, axis=1) * weight
    return noise_S


def fractal(y: Floats, x: Floats, *, scale: float, octaves: int, seed: int) -> Floats:
    """Noise of mean 0 and deviation 1: octaves of half the scale and 0.55 of the weight.

    Arguments and result are those of ``smooth_noise``.
    """
    total_S = np.zeros((y.size, x.size), np.float32)
    power = 0.0
    for octave in range(octaves):
        weight = 0.55**octave
        power += weight**2
        noise_S = smooth_noise(y, x, scale=scale / 2**octave, seed=seed * 31 + octave)
        noise_S *= np.float32(weight)
        total_S += noise_S
    total_S *= np.float32(1 / (0.277 * power**0.5))
    return total_S


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cells:
    """The nearest of the points scattered one to a square, and how far it is."""

    id_S: Ints
    """A random number naming the point."""

    dy_S: Floats
    """Rows from the point, in pixels."""

    dx_S: Floats
    """Columns from the point, in pixels."""

    edge_S: Floats
    """Distance to where another point becomes the nearest, in pixels, roughly."""


def cells(y_S: Floats, x_S: Floats, *, scale: float, seed: int) -> Cells:
    """Voronoi cells of one point per square of ``scale`` px; ``y_S`` and ``x_S`` may broadcast."""
    row_S, column_S = (np.floor(t / np.float32(scale)).astype(np.int32) for t in (y_S, x_S))
    top, left = int(row_S.min()) - 1, int(column_S.min()) - 1
    rows = np.arange(top, int(row_S.max()) + 2, dtype=np.int32)[:, None]
    columns = np.arange(left, int(column_S.max()) + 2, dtype=np.int32)[None, :]
    names = hashed(rows.view(np.uint32), columns.view(np.uint32), seed)
    points_y = _jittered(rows, uniform(names, 1), scale)
    points_x = _jittered(columns, uniform(names, 2), scale)
    here_S = (row_S - top) * columns.size + (column_S - left)
    first = np.full(here_S.shape, np.inf, np.float32)
    second, nearest = first.copy(), here_S
    for step in (r * columns.size + c for r in (-1, 0, 1) for c in (-1, 0, 1)):
        point = here_S + step
        distance = (y_S - points_y[point]) ** 2 + (x_S - points_x[point]) ** 2
        np.minimum(second, np.maximum(first, distance), out=second)
        nearest = np.where(distance < first, point, nearest)
        np.minimum(first, distance, out=first)
    return Cells(
        id_S=names.ravel()[nearest],
        dy_S=y_S - points_y[nearest],
        dx_S=x_S - points_x[nearest],
        edge_S=(np.sqrt(second) - np.sqrt(first)) * np.float32(0.5),
    )


def strips(t_S: Floats, *, name_S: Ints, seed: int) -> tuple[Ints, Floats]:
    """Cut a line, in units of the mean width, into pieces of uneven width.

    Returns:
        The number of the piece, and the distance to its nearer end in units of the mean width.
    """

    def cut(number: NDArray[np.int32]) -> Floats:
        jitter = uniform(number.view(np.uint32), name_S, seed) - np.float32(0.5)
        return number.astype(np.float32) + np.float32(0.7) * jitter

    piece = np.floor(t_S).astype(np.int32)
    before, after = cut(piece), cut(piece + 1)
    piece += (t_S >= after).astype(np.int32) - (t_S < before).astype(np.int32)
    before, after = cut(piece), cut(piece + 1)
    return piece.view(np.uint32), np.minimum(t_S - before, after - t_S)


def _jittered(square: NDArray[np.int32], share: Floats, scale: float) -> Floats:
    """Where in its square each point lies, along one axis, in pixels; never close to an edge."""
    place = square.astype(np.float32) + np.float32(0.7) * share
    place += np.float32(0.15)
    place *= np.float32(scale)
    return place.ravel()


def _splines(t: Floats, scale: float) -> tuple[NDArray[np.int32], list[Floats]]:
    """First of the four lattice points around each place, and the weights of all four."""
    t = t / np.float32(scale)
    floor = np.floor(t)
    u = t - floor
    v = 1 - u
    weights = [v**3, 4 - 6 * u**2 + 3 * u**3, 4 - 6 * v**2 + 3 * v**3, u**3]
    return floor.astype(np.int32) - 1, [(w / 6).astype(np.float32) for w in weights]
