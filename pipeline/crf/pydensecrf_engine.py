"""pydensecrf as an engine: the reference (Krahenbuhl and Koltun, 2011).

It takes C-ordered float32 (D, N) and (K, N) and runs in the calling thread, holding Python's lock.
It takes pixels by four and fills the last group with a pixel of weight zero at feature 0: the
lattice then has a few more vertices near the scene's first pixel, so N modulo 4 may show there,
and only there. Its lattice keys are int16: ``ResolvedCrf.check_extent`` refuses what would wrap.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.crf.engine import Engine, Pairwise


class PydensecrfEngine(Engine):
    """Mean field through pydensecrf's n-D path."""

    def mean_field(
        self, energy_KN: NDArray[np.float32], kernels: Sequence[Pairwise], *, iterations: int
    ) -> NDArray[np.float32]:
        """As ``Engine.mean_field``."""
        from pydensecrf import densecrf

        field = densecrf.DenseCRF(energy_KN.shape[1], energy_KN.shape[0])
        field.setUnaryEnergy(energy_KN)
        for kernel in kernels:
            field.addPairwiseEnergy(
                kernel.features_DN,
                compat=kernel.compatibility,
                kernel=densecrf.DIAG_KERNEL,
                normalization=densecrf.NORMALIZE_SYMMETRIC,
            )
        return np.array(field.inference(iterations), dtype=np.float32, order="C")
