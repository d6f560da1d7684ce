"""The network on its device: loaded once, then logits tile by tile.

Axes in array names: C channel, K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.domain import Region
from pipeline.errors import SourceError
from pipeline.inference.precision import Precision, fix_kernels
from pipeline.inference.stage_plan import coarse_region
from pipeline.inference.staged import StagedNetwork, WholeNetwork
from pipeline.models.bundle import Bundle
from pipeline.models.context_pool import Context
from pipeline.models.frame import Frame
from pipeline.models.stages import stages_of

_FORMAT = {2: torch.channels_last, 3: torch.channels_last_3d}

WINDOW = 64
"""Side of a box of features: the device computes as many at once."""


class Predictor:
    """A bundle's network, ready to predict."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str,
        precision: Precision,
        context: Context,
        threads: int,
        window: int | None = WINDOW,
    ) -> None:
        """Load the network; ``window`` None runs it as one, as a network without stages must be.

        Raises:
            BundleError: the weights do not fit, or a layer cannot run in windows.
        """
        fix_kernels()
        self._dims = bundle.architecture.dims
        self._device, self._dtype = torch.device(device), precision.dtype
        self._format = _FORMAT[self._dims] if precision.channels_last else torch.contiguous_format
        self._stride, self._threads = bundle.architecture.output_stride, threads
        network = bundle.network()
        if context == "tile":
            network.pool_over(None)
        self._bands, self._upsample = network.bands, network.upsample
        if window is None:
            for weight in (*network.parameters(), *network.buffers()):
                weight.data = self._moved(weight.data)
            self._network: StagedNetwork | WholeNetwork = WholeNetwork(network)
        else:
            self._network = StagedNetwork(stages_of(network).moved(self._moved), window=window)

    def logits(self, image_CS: NDArray[np.float32], frame: Frame, *, scored: Region) -> Tensor:
        """Predict ``scored``, a region of the scene, from an input that lies at ``frame``.

        Sides and origin of the input are multiples of the stride.

        Returns:
            (K, *S) float32 logits on the device, S as ``scored``; a new tensor.

        Raises:
            SourceError: another number of bands than the network has.
            RegionError: the input does not lie on the stride, reaches outside the scene, does not
                hold ``scored``, or is smaller than the window of image pooling.
        """
        if len(image_CS) != self._bands:
            raise SourceError(
                f"the network takes {self._bands} bands, the input has {len(image_CS)}"
            )
        size = image_CS.shape[1:]
        frame.check(size, stride=self._stride)
        read = Region(frame.origin, tuple(a + n for a, n in zip(frame.origin, size, strict=True)))
        coarse = coarse_region(read, scored=scored, stride=self._stride)
        # Here, not at construction: networks with other threads may share the process.
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            image_BCS = self._moved(torch.from_numpy(np.ascontiguousarray(image_CS)).unsqueeze(0))
            coarse_BKS = self._network.coarse_logits(image_BCS, frame, coarse)
            # Interpolated in float32 in any case: bfloat16 would turn ramps into steps.
            logits_BKS: Tensor = self._upsample(coarse_BKS.float().contiguous())
        around = Region(
            tuple(a + n * self._stride for a, n in zip(frame.origin, coarse.start, strict=True)),
            tuple(a + n * self._stride for a, n in zip(frame.origin, coarse.stop, strict=True)),
        )
        index: tuple[Any, ...] = (0, ..., *scored.slices(within=around))
        return logits_BKS[index]

    def _moved(self, tensor: Tensor) -> Tensor:
        """On the device, in its floats and memory format."""
        moved = tensor.to(device=self._device)
        if moved.is_floating_point():
            moved = moved.to(dtype=self._dtype)
        spatial = moved.ndim == self._dims + 2
        return moved.contiguous(memory_format=self._format) if spatial else moved
