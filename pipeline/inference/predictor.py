"""The network on its device: loaded once, then logits tile by tile.

Axes in array names: C channel, K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import SourceError
from pipeline.inference.precision import Precision
from pipeline.models.bundle import Bundle
from pipeline.models.context_pool import Context
from pipeline.models.frame import Frame

_FORMAT = {2: torch.channels_last, 3: torch.channels_last_3d}


class Predictor:
    """A bundle's network, ready to predict."""

    loads: int
    """How often the weights were read; 1."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str,
        precision: Precision,
        context: Context,
        threads: int,
    ) -> None:
        """Load the network. Raises BundleError."""
        # TF32 keeps 10 bits of fp32's 23, and a benchmarked algorithm differs from run to run.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        dims = bundle.architecture.dims
        self._device, self._dtype = torch.device(device), precision.dtype
        self._format = _FORMAT[dims] if precision.channels_last else torch.contiguous_format
        self._stride, self._threads = bundle.architecture.output_stride, threads
        network = bundle.network()
        self.loads = 1
        if context == "tile":
            network.pool_over(None)
        network.to(device=self._device, dtype=self._dtype)
        # Module.to would convert weights of four axes alone.
        for weight in network.parameters():
            if weight.ndim == dims + 2:
                weight.data = weight.data.contiguous(memory_format=self._format)
        self._network = network

    def logits(self, image_CS: NDArray[np.float32], frame: Frame) -> Tensor:
        """Predict an input that lies at ``frame``; sides and origin are multiples of the stride.

        Returns:
            (K, *S) float32 logits on the device, S as the input; a new tensor.

        Raises:
            SourceError: another number of bands than the network has.
            RegionError: the input does not lie on the stride, reaches outside the scene, or is
                smaller than the window of image pooling.
        """
        if len(image_CS) != self._network.bands:
            raise SourceError(
                f"the network takes {self._network.bands} bands, the input has {len(image_CS)}"
            )
        frame.check(image_CS.shape[1:], stride=self._stride)
        # Here, not at construction: networks with other threads may share the process.
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            image_BCS = torch.from_numpy(np.ascontiguousarray(image_CS)).unsqueeze(0)
            image_BCS = image_BCS.to(device=self._device, dtype=self._dtype)
            image_BCS = image_BCS.contiguous(memory_format=self._format)
            coarse_BKS = self._network.coarse_logits(image_BCS, frame)
            # Interpolated in float32 in any case: bfloat16 would turn ramps into steps.
            logits_BKS: Tensor = self._network.upsample(coarse_BKS.float().contiguous())
        return logits_BKS[0]
