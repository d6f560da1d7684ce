"""Dense CRF mean field over one tile (Krahenbuhl and Koltun, 2011).

Axes in array names: K class, C channel, S space (YX or ZYX), D feature, N valid pixel in row-major
order of S.

Positions are those of the scene, so that neighbouring tiles share one lattice; features run
x, y(, z), bands, since the order of the axes is part of the lattice's rounding.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.crf.engine import Engine, Pairwise
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
    valid_S = block.valid_S
    assert prob_KS.shape[1:] == block.image_CS.shape[1:] == valid_S.shape
    assert len(origin) == valid_S.ndim
    assert min(origin) >= 0
    refined_KS = prob_KS.astype(np.float32, order="C")
    params.check_classes(len(prob_KS))
    if not valid_S.any():
        return refined_KS
    energy_KN, kernels = to_engine(refined_KS, block=block, origin=origin, params=params)
    found_KN = engine.mean_field(energy_KN, kernels, iterations=params.iterations)
    if valid_S.all():  # a boolean index takes as long as an iteration
        return found_KN.reshape(refined_KS.shape)
    refined_KS[:, valid_S] = found_KN
    return refined_KS


def to_engine(
    prob_KS: NDArray[np.float32],
    *,
    block: Block,
    origin: tuple[int, ...],
    params: ResolvedCrf,
) -> tuple[NDArray[np.float32], list[Pairwise]]:
    """What an engine takes of these pixels: energies (K, N), and kernels over the valid ones.

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
    return _checked(energy_KN, what="probability"), kernels


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
