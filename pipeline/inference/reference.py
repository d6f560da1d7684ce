"""The network as one plain module: what tiles are measured against.

Axes in array names: B batch, C channel, K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.inference.average import Average
from pipeline.inference.convolution import fix_convolutions
from pipeline.inference.precision import Precision, fix_kernels
from pipeline.inference.zoom import NATURAL, Zoom
from pipeline.models.bundle import Bundle
from pipeline.models.frame import Frame
from pipeline.models.geometry import Scale
from pipeline.models.scene_mean import GivenMean
from pipeline.models.stages import TRACING

_FORMAT = {2: torch.channels_last, 3: torch.channels_last_3d}


class _Given(nn.Module):
    """Image pooling by a mean that is known."""

    def __init__(self, mean: GivenMean) -> None:
        super().__init__()
        self._mean = mean

    def forward(self, features_BCS: Tensor, frame: Frame) -> Tensor:
        return self._mean.over(features_BCS)


class ReferenceNetwork:
    """A bundle's network with nothing taken apart, pooling over its training crop or as told."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str,
        precision: Precision,
        average: Average,
        threads: int,
    ) -> None:
        """Load it in the floats, memory format and threads of the tiles. Raises BundleError."""
        fix_kernels()
        self._dims = bundle.architecture.dims
        self._device, self._dtype, self._threads = torch.device(device), precision.dtype, threads
        self._average = average
        self._format = _FORMAT[self._dims] if precision.channels_last else torch.contiguous_format
        self._network = bundle.network(self._moved)
        fix_convolutions(self._network)

    def _moved(self, weight: Tensor) -> Tensor:
        """On the device, in the floats and the memory format of the tiles."""
        weight = weight.to(self._device, self._dtype if weight.is_floating_point() else None)
        spatial = weight.ndim == self._dims + 2
        return weight.contiguous(memory_format=self._format) if spatial else weight

    def logits(
        self, image_CS: NDArray[np.float32], frame: Frame, *, mean: GivenMean | None
    ) -> NDArray[np.float32]:
        """Predict all of an input that lies at ``frame``; (K, *S) float32, a new array.

        ``mean`` stands for image pooling where that is over the whole scene. Of several passes
        it is the logarithm of the mean of their probabilities.
        """
        if self._average.alone:
            return self._pass(image_CS, frame, mean=mean, zoom=NATURAL)
        passes = itertools.product(self._average.zooms, self._average.mirrors)
        logs = [self._log_probabilities(image_CS, frame, *one) for one in passes]
        total_KS: NDArray[np.float64] = np.logaddexp.reduce(logs)
        mean_KS: NDArray[np.float32] = (total_KS - np.log(len(logs))).astype(np.float32)
        return mean_KS

    def _log_probabilities(
        self, image_CS: NDArray[np.float32], frame: Frame, zoom: Zoom, axes: tuple[int, ...]
    ) -> NDArray[np.float64]:
        """(K, *S): of the image resized, mirrored along ``axes`` of S, and brought back."""
        flipped = tuple(1 + axis for axis in axes)
        rows = zip(frame.origin, image_CS.shape[1:], frame.shape, strict=True)
        origin = tuple(
            side - a - n if axis in axes else a for axis, (a, n, side) in enumerate(rows)
        )
        mirror_CS = np.ascontiguousarray(np.flip(image_CS, flipped))
        logits_KS = self._pass(mirror_CS, Frame(origin, frame.shape), mean=None, zoom=zoom)
        logits_KS = np.flip(logits_KS, flipped).astype(np.float64)
        return np.asarray(logits_KS - np.logaddexp.reduce(logits_KS, axis=0))

    def _pass(
        self, image_CS: NDArray[np.float32], frame: Frame, *, mean: GivenMean | None, zoom: Zoom
    ) -> NDArray[np.float32]:
        """As ``logits``, of one pass."""
        last = Scale.of(self._network.upsample)
        if mean is not None and self._network.pool is not None:
            self._network.pool[0] = _Given(mean)
        torch.set_num_threads(self._threads)
        # Another thread of this process may trace a network, which patches every module.
        with TRACING, torch.inference_mode():
            image_BCS = torch.from_numpy(image_CS).unsqueeze(0).to(self._device)
            # As of the tiles: bfloat16 would turn ramps into steps. In fp32 it is the forward.
            image_BCS = zoom.scale(last).layer(image_BCS.contiguous()).to(self._dtype)
            image_BCS = image_BCS.contiguous(memory_format=self._format)
            coarse_BKS = self._network.coarse_logits(image_BCS, zoom.frame(frame, like=last))
            logits_BKS = zoom.upsample(last).layer(coarse_BKS.float().contiguous())
        logits_KS: NDArray[np.float32] = logits_BKS[0].cpu().numpy()
        return logits_KS
