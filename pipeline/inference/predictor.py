"""The network on its device: loaded once, then logits tile by tile.

Axes in array names: C channel, K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.domain import Region
from pipeline.errors import BundleError, SourceError
from pipeline.inference.canonical import BoxMap, CanonicalNetwork, upsampled
from pipeline.inference.convolution import fix_convolutions
from pipeline.inference.normalise import Image
from pipeline.inference.precision import Precision, fix_kernels
from pipeline.inference.row_sums import with_row_sums
from pipeline.inference.stage_plan import coarse_place, coarse_region, feature_region
from pipeline.inference.staged import Picture, StagedNetwork, WholeNetwork
from pipeline.inference.zoom import NATURAL, Zoom
from pipeline.models.bundle import Bundle
from pipeline.models.chain import Chain
from pipeline.models.context_pool import Context
from pipeline.models.custom_network import CustomNetwork
from pipeline.models.frame import Frame
from pipeline.models.geometry import Scale
from pipeline.models.scene_mean import GivenMean, OwnMean
from pipeline.models.scene_stages import pooled_by, pooled_chain
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
        hosted: bool = False,
        canonical_px: int | None = None,
    ) -> None:
        """Load the network; ``window`` None runs it as one, as somebody's own always is.

        With ``hosted``, its maps are held in the memory of the host, wherever it computes.
        With ``canonical_px``, a side in pixels, windows are canonical, and ``window`` is not used.

        Raises:
            BundleError: the weights do not fit, or a layer cannot run in windows.
        """
        fix_kernels()
        self._dims = bundle.architecture.dims
        self._device, self._dtype = torch.device(device), precision.dtype
        self._format = _FORMAT[self._dims] if precision.channels_last else torch.contiguous_format
        self._threads = threads
        # Without gradients: a part of a weight would keep all of it for them.
        network = bundle.network(self._moved).requires_grad_(False)
        self._stride, self._scale = network.stride, Scale.of(network.upsample)
        if context == "tile":
            network.pool_over(None)
        self._bands = network.bands
        if window is None and context == "scene":
            raise BundleError("context 'scene' needs a network in stages: give it windows")
        self._canonical_px, self._window, self._hosted = canonical_px, window, hosted
        self._network: CanonicalNetwork | StagedNetwork | WholeNetwork
        if isinstance(network, CustomNetwork) or (canonical_px is None and window is None):
            fix_convolutions(network)
            self._network = WholeNetwork(network)
        else:
            chain = stages_of(network)
            # The mean of a scene takes other chains, made of one whose stages are the network's.
            # Sums in bfloat16 would be rounded for each row of a kernel.
            rows = canonical_px is None and self._dtype == torch.float32
            if rows and context != "scene":
                chain = with_row_sums(chain)
            self._network = self._in_windows(chain)

    def logits(
        self,
        image_CS: Image,
        frame: Frame,
        *,
        scored: Region,
        pooling: GivenMean | OwnMean | None = None,
        zoom: Zoom = NATURAL,
    ) -> Tensor:
        """Predict ``scored``, a region of the scene, from an input that lies at ``frame``.

        The input has valid sides, and its origin lies on the stride. It is asked for band by band,
        and let go before its logits are upsampled. With context
        ``scene``, ``pooling`` is the scene's mean, or how to take it where the input is all of it.
        The network sees the scene as ``zoom`` makes it, and its scores are resized to the scene.

        Returns:
            (K, *S) float32 logits on the device, S as ``scored``; a new tensor.

        Raises:
            SourceError: another number of bands than the network has.
            RegionError: the input does not lie on the stride, reaches outside the scene, does not
                hold ``scored``, or is smaller than the window of image pooling; or, with
                canonical windows, does not hold all that ``scored`` needs.
        """
        read, upsample = self._read(image_CS, frame, zoom), zoom.upsample(self._scale)
        coarse = coarse_region(read, scored=scored, upsample=upsample)
        # Not the module's call, which another thread that traces a network would take for its own.
        network, resized = self._network, upsample.layer.forward
        if pooling is not None:
            assert not isinstance(network, WholeNetwork)
            network = self._in_windows(pooled_by(network.chain, pooling))
        with torch.inference_mode():
            inputs = [self._input(image_CS, zoom)]
            del image_CS  # and popped: the network's is the only reference
            seen = zoom.frame(frame, like=self._scale)
            coarse_BKS = network.coarse_logits(inputs.pop(), seen, coarse)
            at = coarse.move(coarse_place(frame.origin, upsample=upsample))
            # Interpolated in float32 in any case: bfloat16 would turn ramps into steps.
            if self._canonical_px is not None:
                return upsampled(
                    resized,
                    BoxMap(coarse_BKS.movedim(1, -1), at, coarse_BKS.device),
                    scored,
                    side_px=self._canonical_px,
                    shape=frame.shape,
                    upsample=upsample,
                )
            logits_BKS: Tensor = resized(coarse_BKS.float().contiguous())
        index: tuple[Any, ...] = (0, ..., *scored.slices(within=upsample.gives(at)))
        return logits_BKS[index]

    def pooled(self, image_CS: Image, frame: Frame, *, core: Region) -> Tensor:
        """The features of ``core`` whose mean image pooling takes, after its convolution and norm.

        ``core``, a region of the scene, lies on the stride; the input as in ``logits``.

        Returns:
            (C, *S / stride) in the network's floats, on the device; a new tensor.

        Raises as ``logits`` does.
        """
        assert not isinstance(self._network, WholeNetwork)
        read = self._read(image_CS, frame, NATURAL)
        places = feature_region(read, core=core, stride=self._stride)
        network = self._in_windows(pooled_chain(self._network.chain))
        with torch.inference_mode():
            inputs = [self._input(image_CS, NATURAL)]
            del image_CS
            return network.coarse_logits(inputs.pop(), frame, places)[0]

    def _in_windows(self, chain: Chain) -> CanonicalNetwork | StagedNetwork:
        """A network, or part of one, ready to run in the windows asked for."""
        if self._canonical_px is not None:
            return CanonicalNetwork(chain, side_px=self._canonical_px)
        assert self._window is not None
        return StagedNetwork(chain, window=self._window, hosted=self._hosted)

    def _read(self, image_CS: Image, frame: Frame, zoom: Zoom) -> Region:
        """Where the input lies in the scene. Raises SourceError or RegionError."""
        bands, size = image_CS.shape[0], tuple(image_CS.shape[1:])
        if bands != self._bands:
            raise SourceError(f"the network takes {self._bands} bands, the input has {bands}")
        stride = zoom.stride(self._stride)
        frame.check(size, stride=stride, endpoint=int(self._scale.align_corners))
        return Region(frame.origin, tuple(a + n for a, n in zip(frame.origin, size, strict=True)))

    def _input(self, image_CS: Image, zoom: Zoom) -> Picture:
        """(1, C, *S) on the device."""
        # Here, not at construction: networks with other threads may share the process.
        torch.set_num_threads(self._threads)
        if zoom.natural:
            maps = torch.device("cpu") if self._hosted else self._device
            return _Moved(image_CS, partial(self._moved, device=maps))
        # In float32: bfloat16 would turn ramps into steps.
        image_BCS = torch.from_numpy(image_CS[:,]).unsqueeze(0).to(self._device).contiguous()
        return self._moved(zoom.scale(self._scale).layer.forward(image_BCS))

    def _moved(self, tensor: Tensor, *, device: torch.device | None = None) -> Tensor:
        """On the device, or on another, in its floats and memory format."""
        moved = tensor.to(device=device or self._device)
        if moved.is_floating_point():
            moved = moved.to(dtype=self._dtype)
        spatial = moved.ndim == self._dims + 2
        return moved.contiguous(memory_format=self._format) if spatial else moved


@dataclass(frozen=True, slots=True)
class _Moved:
    """An image where its map is held, moved part by part."""

    image_CS: Image
    move: Callable[[Tensor], Tensor]

    @property
    def shape(self) -> Sequence[int]:
        """As ``Picture.shape``."""
        return (1, *self.image_CS.shape)

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor:
        """As ``Picture``; of the same memory where nothing has to be moved."""
        return self.move(torch.from_numpy(self.image_CS[index[1:]]).unsqueeze(0))
