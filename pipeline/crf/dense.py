"""Dense CRF mean field over one tile, through pydensecrf (Krahenbuhl and Koltun, 2011).

Axes in array names: K class, C channel, S space (YX or ZYX), D feature, N valid pixel in row-major
order of S. pydensecrf takes C-ordered float32 (D, N) and (K, N) and runs in the calling thread.

Positions are those of the scene, so that neighbouring tiles share one lattice; features run
x, y(, z), bands, since the order of the axes is part of the lattice's rounding. pydensecrf takes
pixels by four and fills the last group with a pixel of weight zero at feature 0: the lattice then
has a few more vertices near the scene's first pixel, so N modulo 4 may show there, and only there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.crf.params import GUIDE_MAX, ResolvedCrf, ResolvedKernel
from pipeline.errors import CrfError

_LEAST_PROB = 1e-5
"""A class never weighs less than this, so that neighbours can still bring it back."""


def require_engine() -> Any:
    """Return pydensecrf's extension module, the engine of ``refine``.

    Raises:
        CrfError: pydensecrf is not installed.
    """
    try:
        from pydensecrf import densecrf
    except ImportError as error:
        raise CrfError(
            "crf: pydensecrf is not installed; pip install 'terravox[crf]', or use --crf off"
        ) from error
    return densecrf


def refine(
    prob_KS: NDArray[np.floating],
    *,
    guide_CS: NDArray[Any],
    valid_S: NDArray[np.bool_],
    origin: tuple[int, ...],
    params: ResolvedCrf,
) -> NDArray[np.float32]:
    """Refine class probabilities; invalid pixels take no part and come back as they were.

    Args:
        prob_KS: (K, *S) in [0, 1], sums to 1 over K.
        guide_CS: (C, *S) any real dtype, channels as in ``CrfParams.resolve``.
        valid_S: (*S) False where a pixel is to be left out.
        origin: scene coordinates of the arrays' first pixel, per axis, not negative.
        params: the CRF on this image's grid.

    Returns:
        (K, *S) float32, sums to 1 over K where valid; a new array.

    Raises:
        CrfError: pydensecrf is absent, a valid pixel is not finite, or lies beyond its key range.
    """
    assert prob_KS.shape[1:] == guide_CS.shape[1:] == valid_S.shape
    assert len(origin) == valid_S.ndim
    assert min(origin) >= 0
    refined_KS = prob_KS.astype(np.float32, order="C")
    params.check_classes(len(prob_KS))
    if not valid_S.any():
        return refined_KS
    position_SN = tuple(
        index + first for index, first in zip(np.nonzero(valid_S), origin, strict=True)
    )
    params.check_extent(tuple(int(axis.max()) + 1 for axis in position_SN))
    energy_KN = -np.log(np.clip(refined_KS[:, valid_S], _LEAST_PROB, 1.0))
    engine = require_engine()
    field = engine.DenseCRF(energy_KN.shape[1], energy_KN.shape[0])
    field.setUnaryEnergy(_checked(energy_KN, what="probability"))
    for kernel in params.kernels:
        features_DN = _features(kernel, guide_CS=guide_CS, valid_S=valid_S, position_SN=position_SN)
        field.addPairwiseEnergy(
            _checked(features_DN, what="guide value"),
            compat=_cost(kernel, params),
            kernel=engine.DIAG_KERNEL,
            normalization=engine.NORMALIZE_SYMMETRIC,
        )
    refined_KS[:, valid_S] = np.asarray(field.inference(params.iterations))
    return refined_KS


def _cost(kernel: ResolvedKernel, params: ResolvedCrf) -> Any:
    """What pydensecrf takes: the weight for Potts, else (K, K) float32 costs."""
    if params.compatibility is None:
        return kernel.weight
    return np.array(params.compatibility, np.float32) * np.float32(kernel.weight)


def _features(
    kernel: ResolvedKernel,
    *,
    guide_CS: NDArray[Any],
    valid_S: NDArray[np.bool_],
    position_SN: tuple[NDArray[np.intp], ...],
) -> NDArray[np.float32]:
    """Features in units of their deviation, (D, N) float32; positions first, x before y."""
    deviations = kernel.position_px
    rows = [axis / dev for axis, dev in zip(position_SN[::-1], deviations[::-1], strict=True)]
    if kernel.guide is not None:
        guide = kernel.guide
        for channel, dev, (low, high) in zip(
            kernel.channels, guide.value, guide.range, strict=True
        ):
            band_N = guide_CS[channel][valid_S].astype(np.float64)
            scaled_N = np.clip((band_N - low) * (GUIDE_MAX / (high - low)), 0.0, GUIDE_MAX)
            rows.append(scaled_N / dev)
    return np.stack(rows, dtype=np.float32, casting="same_kind")


def _checked(array: NDArray[np.float32], *, what: str) -> NDArray[np.float32]:
    """The array C-ordered; one NaN would spread over the whole tile, so it is refused."""
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise CrfError(f"crf: {bad} valid pixels have a {what} that is NaN; mark them invalid")
    return np.ascontiguousarray(array)
