"""Dense CRF mean field over one tile (Krahenbuhl and Koltun, 2011).

Axes in array names: K class, C channel, S space (YX or ZYX), D feature, N valid pixel in row-major
order of S.

Positions are those of the scene, so that neighbouring tiles share one lattice; features run
x, y(, z), bands, since the order of the axes is part of the lattice's rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.crf.engine import Engine, Pairwise, Problem
from pipeline.crf.params import GUIDE_MAX, ResolvedCrf, ResolvedKernel
from pipeline.errors import CrfError
from pipeline.ports import Block

_LEAST_PROB = 1e-5
"""A class never weighs less than this, so that neighbours can still bring it back."""


def refine(
    prob_KS: NDArray[np.floating],
    *,
    block: Block,
    origin: tuple[int, ...],
    params: ResolvedCrf,
    engine: Engine,
) -> NDArray[np.float32]:
    """Refine class probabilities; invalid pixels take no part and come back as they were.

    Args:
        prob_KS: (K, *S) in [0, 1], sums to 1 over K.
        block: what guides, over the same pixels: any real dtype, channels as in
            ``CrfParams.resolve``, and which pixels take part.
        origin: scene coordinates of the arrays' first pixel, per axis, not negative.
        params: the CRF on this image's grid.
        engine: that computes the mean field.

    Returns:
        (K, *S) float32, sums to 1 over K where valid; a new array.

    Raises:
        CrfError: a valid pixel is not finite, or lies beyond the engine's key range.
    """
    image = Unrefined(prob_KS=prob_KS, block=block, origin=origin, params=params)
    return next(refine_each([image], engine=engine))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unrefined:
    """An image, or a part of it, that is to be refined: see ``refine``."""

    prob_KS: NDArray[np.floating]
    block: Block
    origin: tuple[int, ...]
    params: ResolvedCrf

    def __post_init__(self) -> None:
        assert self.prob_KS.shape[1:] == self.block.image_CS.shape[1:] == self.block.valid_S.shape
        assert len(self.origin) == self.block.valid_S.ndim
        assert min(self.origin) >= 0
        self.params.check_classes(len(self.prob_KS))


def refine_each(images: Iterable[Unrefined], *, engine: Engine) -> Iterator[NDArray[np.float32]]:
    """What ``refine`` returns for each, in their order; small ones together where that pays.

    All by one CRF: on images of different spacing its ``params`` differ in their deviations.

    Raises CrfError: as ``refine`` does.
    """
    for together in _groups(images, most_pixels=engine.most_together):
        yield from _refined(together, engine)


def _groups(images: Iterable[Unrefined], *, most_pixels: int) -> Iterator[list[Unrefined]]:
    """One after the other, as many together as have so many pixels and the same axes."""
    group: list[Unrefined] = []
    for image in images:
        pixels = sum(one.block.valid_S.size for one in [*group, image])
        if group and (pixels > most_pixels or len(image.origin) != len(group[0].origin)):
            yield group
            group = []
        group.append(image)
    if group:
        yield group


def _refined(images: Sequence[Unrefined], engine: Engine) -> Iterator[NDArray[np.float32]]:
    """In one call of the engine."""
    probs = [image.prob_KS.astype(np.float32, order="C") for image in images]
    problems = [
        to_engine(prob_KS, block=image.block, origin=image.origin, params=image.params)
        for image, prob_KS in zip(images, probs, strict=True)
        if image.block.valid_S.any()
    ]
    iterations = images[0].params.iterations
    found = iter(engine.mean_fields(problems, iterations=iterations) if problems else ())
    for image, prob_KS in zip(images, probs, strict=True):
        valid_S = image.block.valid_S
        if valid_S.all():  # a boolean index takes as long as an iteration
            yield next(found).reshape(prob_KS.shape)
            continue
        if valid_S.any():
            prob_KS[:, valid_S] = next(found)
        yield prob_KS


def to_engine(
    prob_KS: NDArray[np.float32],
    *,
    block: Block,
    origin: tuple[int, ...],
    params: ResolvedCrf,
) -> Problem:
    """What an engine takes of these pixels: those that are valid, of which there is one.

    Raises CrfError: a valid pixel is not finite, or lies beyond the engine's key range.
    """
    whole = bool(block.valid_S.all())
    prob_KN = prob_KS.reshape(len(prob_KS), -1) if whole else prob_KS[:, block.valid_S]
    energy_KN = -np.log(np.clip(prob_KN, _LEAST_PROB, 1.0))
    features = features_of(block, origin=origin, params=params)
    kernels = [
        Pairwise(
            features_DN=features_DN,
            compatibility=_cost(kernel, params),
            # As in every image of this shape.
            recurring=kernel.guide is None and whole and not any(origin),
        )
        for kernel, features_DN in zip(params.kernels, features, strict=True)
    ]
    return Problem(energy_KN=_checked(energy_KN, what="probability"), kernels=kernels)


def features_of(
    block: Block, *, origin: tuple[int, ...], params: ResolvedCrf
) -> list[NDArray[np.float32]]:
    """Of each kernel, over the valid pixels, in units of its deviations: (D, N), new.

    Raises CrfError: a valid pixel is not finite, or lies beyond the engine's key range.
    """
    position_SN = tuple(
        index + first for index, first in zip(np.nonzero(block.valid_S), origin, strict=True)
    )
    params.check_extent(tuple(int(axis.max()) + 1 for axis in position_SN))
    return [
        _checked(_features(kernel, block=block, position_SN=position_SN), what="guide value")
        for kernel in params.kernels
    ]


def _cost(kernel: ResolvedKernel, params: ResolvedCrf) -> float | NDArray[np.float32]:
    """The weight of a Potts kernel, else (K, K) penalties."""
    if params.compatibility is None:
        return kernel.weight
    return np.array(params.compatibility, np.float32) * np.float32(kernel.weight)


def _features(
    kernel: ResolvedKernel, *, block: Block, position_SN: tuple[NDArray[np.intp], ...]
) -> NDArray[np.float32]:
    """Features in units of their deviation, (D, N) float32; positions first, x before y."""
    deviations = kernel.position_px
    rows = [axis / dev for axis, dev in zip(position_SN[::-1], deviations[::-1], strict=True)]
    if kernel.guide is not None:
        guide = kernel.guide
        for channel, dev, (low, high) in zip(
            kernel.channels, guide.value, guide.range, strict=True
        ):
            band_N = block.image_CS[channel][block.valid_S].astype(np.float64)
            scaled_N = np.clip((band_N - low) * (GUIDE_MAX / (high - low)), 0.0, GUIDE_MAX)
            rows.append(scaled_N / dev)
    return np.stack(rows, dtype=np.float32, casting="same_kind")


def _checked(array: NDArray[np.float32], *, what: str) -> NDArray[np.float32]:
    """The array C-ordered; one NaN would spread over the whole tile, so it is refused."""
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise CrfError(f"crf: {bad} valid pixels have a {what} that is NaN; mark them invalid")
    return np.ascontiguousarray(array)
