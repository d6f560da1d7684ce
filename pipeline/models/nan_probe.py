"""The NaN probe: what a network's output depends on, asked of the network itself.

NaN survives every sum and product, weights of zero included: the outputs that turn NaN when a
pixel does are those that it reaches. No layer has to be known for that, so this is a witness to the
interval arithmetic (``receptive_field``), and the only one for a network that somebody brings.
Axes in array names: B batch, C channel, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.domain import Halo, Shape
from pipeline.errors import BundleError
from pipeline.models.custom_network import CustomNetwork, problem_of
from pipeline.models.deeplab import DeepLab
from pipeline.models.frame import Frame
from pipeline.models.nan_watch import NanWatch

_WIDTH_PX = 16
"""Width of the strips; two strides where that is more."""

_WATCHED = 32
"""Length in strides of the strips on which all layers are watched, which is slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """How far a network was seen to reach, from stride-aligned regions as ``Reach.halo`` does."""

    stride: int
    """Pixels by which the input must move for the output to move alike; checked."""

    before: tuple[int | None, ...]
    """Pixels needed before a region, per axis; None: GLOBAL, no end within the strip."""

    after: tuple[int | None, ...]
    """Pixels needed after a region, per axis; None where ``before`` is."""

    layers: tuple[str, ...] = ()
    """The layers that make a network GLOBAL; empty where no module alone fills a strip."""

    @property
    def halo(self) -> Halo | None:
        """The reach on all axes; None for a network that is GLOBAL on one."""
        before = tuple(side for side in self.before if side is not None)
        after = tuple(side for side in self.after if side is not None)
        return Halo(before, after) if len(before) == len(after) == len(self.before) else None


def probe(
    module: Callable[[Tensor], Tensor],
    *,
    dims: int,
    bands: int,
    stride: int,
    most_px: int,
    endpoint: int = 0,
) -> Probe:
    """Move a line of NaN over one stride in the middle of strips, along each axis in turn.

    Args:
        module: takes (1, bands, *S), gives (1, K, *S / n) for one whole n; in eval mode. The
            layers of a ``nn.Module`` are watched.
        dims: number of spatial axes.
        bands: channels of the input.
        stride: the output stride, in pixels.
        most_px: length of the strips. What reaches half of it counts as GLOBAL; a lone tap
            further away than that is not seen.
        endpoint: sides of strips are multiples of the stride and so many pixels more.

    Strips are 16 px wide, two strides at least. A layer that passes nothing on across so little
    (an even kernel, widely dilated) is refused.

    Raises:
        BundleError: a module that is in training mode, does not take a strip, gives another size
            or NaN of itself, swallows NaN, or repeats at another stride.
    """
    bench = _Bench.of(
        module, dims=dims, bands=bands, stride=stride, most_px=most_px, endpoint=endpoint
    )
    phases = [bench.watched // 2 + phase for phase in range(stride)]
    return bench.probe(bench.reach, watched=phases)  # a strided 1x1 layer leaves most places out


def probe_halves(
    module: Callable[[Tensor], Tensor],
    *,
    dims: int,
    bands: int,
    stride: int,
    most_px: int,
    endpoint: int = 0,
) -> Probe:
    """``probe``, rounded up to whole strides: half of a strip at once becomes NaN, then the other.

    A few runs, where ``probe`` takes as many as a stride has pixels; for networks of great strides.
    A lone tap is seen wherever it meets the strip.
    """
    bench = _Bench.of(
        module, dims=dims, bands=bands, stride=stride, most_px=most_px, endpoint=endpoint
    )
    return bench.probe(bench.reach_in_strides, watched=[slice(bench.watched // 2, None)])


def probe_network(
    network: DeepLab | CustomNetwork, *, most_px: int, by: Callable[..., Probe] = probe
) -> Probe:
    """``probe`` of a bundle's network, or ``probe_halves``: each strip is a scene of its own."""
    dims = network.architecture.dims

    def place(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor, Frame]:
        return inputs[0], Frame((0,) * dims, tuple(inputs[0].shape[2:]))

    handle = network.register_forward_pre_hook(place)
    try:
        return by(
            network,
            dims=dims,
            bands=network.bands,
            stride=network.stride,
            most_px=most_px,
            endpoint=int(network.upsample.align_corners),
        )
    finally:
        handle.remove()


def touched(
    module: Callable[[Tensor], Tensor], image_BCS: Tensor, *, axis: int, place: int | slice
) -> range:
    """Pixels along a spatial axis, first to last, whose outputs turn NaN when one line does.

    Args:
        module: as in ``probe``.
        image_BCS: (1, C, *S) without NaN; written to.
        axis: the spatial axis, from 0.
        place: pixel or pixels along it; all channels there become NaN, across the other axes.

    Raises:
        BundleError: the module does not take the image, or gives another size.
    """
    image_BCS.movedim(2 + axis, 0)[place] = math.nan
    nan_BKS = _run(module, image_BCS).isnan()
    others = tuple(other for other in range(nan_BKS.ndim) if other != 2 + axis)
    hit = nan_BKS.any(dim=others).nonzero().flatten()
    if not len(hit):
        return range(0)
    scale = image_BCS.shape[2 + axis] // nan_BKS.shape[2 + axis]
    return range(int(hit[0]) * scale, (int(hit[-1]) + 1) * scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """One module, and the strips that it is shown."""

    module: Callable[[Tensor], Tensor]
    dims: int
    bands: int
    stride: int
    length: int

    endpoint: int
    """Pixels of a strip's sides beyond that: 1 where the network aligns corners."""

    @classmethod
    def of(
        cls,
        module: Callable[[Tensor], Tensor],
        *,
        dims: int,
        bands: int,
        stride: int,
        most_px: int,
        endpoint: int,
    ) -> _Bench:
        """Strips of at most ``most_px``. Raises BundleError where they are too short."""
        if isinstance(module, nn.Module) and any(part.training for part in module.modules()):
            raise BundleError(
                "the network is in training mode, where batches mix: call eval() first"
            )
        length = most_px // (2 * stride) * 2 * stride  # so that the middle starts a stride
        if length < 4 * stride:
            raise BundleError(
                f"strips of {most_px} px are too short for an output stride of {stride} px: allow"
                f" {4 * stride} px at least"
            )
        return cls(
            module=module, dims=dims, bands=bands, stride=stride, length=length, endpoint=endpoint
        )

    @property
    def watched(self) -> int:
        """Length of the strips on which all layers are watched."""
        return min(_WATCHED * self.stride, self.length)

    def probe(
        self,
        reach: Callable[[int], tuple[int, int] | None],
        *,
        watched: Sequence[int | slice],
    ) -> Probe:
        """What ``reach`` finds along each axis, once nothing hides NaN at the ``watched`` places.

        Raises BundleError.
        """
        self.check_clean()
        found = [reach(axis) for axis in range(self.dims)]
        if None not in found:
            self.check_passed_on(watched)
        layers: tuple[str, ...] = ()
        for axis in (axis for axis, sides in enumerate(found) if sides is None):
            layers = self.layers_at_fault(axis, known=layers)
        return Probe(
            stride=self.stride,
            before=tuple(None if side is None else side[0] for side in found),
            after=tuple(None if side is None else side[1] for side in found),
            layers=layers,
        )

    def check_clean(self) -> None:
        """Raise BundleError where NaN comes out though none went in."""
        if _run(self.module, self._strip(0, self.length)).isnan().any():
            raise BundleError(
                "the network gives NaN for an input that has none: its weights hold NaN, or a"
                " division of it fails on a plain ramp from 1 to 2"
            )

    def check_passed_on(self, places: Sequence[int | slice]) -> None:
        """Raise BundleError for a layer that hides NaN: what passes through it is not seen."""
        with NanWatch(self.module) as watch:
            for place in places:
                touched(self.module, self._strip(0, self.watched), axis=0, place=place)
        if watch.swallowed:
            raise BundleError(
                f"NaN goes into layer {watch.swallowed[0]} and never comes out, so that its reach"
                " cannot be seen: take nan_to_num, masks and the like out of the network"
            )

    def layers_at_fault(self, axis: int, *, known: tuple[str, ...]) -> tuple[str, ...]:
        """``known`` and those that spread NaN over all of a strip while the others are clean."""
        held = known
        while True:
            with NanWatch(self.module, held=held) as watch:
                self._touched(axis, self.length // 2)
            if watch.filled is None:
                return held
            held = (*held, watch.filled)

    def reach(self, axis: int) -> tuple[int, int] | None:
        """Pixels before and after a region; None where a NaN comes to an end of the strip."""
        middle = self.length // 2
        before = after = 0
        spans = []
        for phase in range(self.stride + 1):
            span = self._touched(axis, middle + phase)
            if span and (span.start == 0 or span.stop >= self.length):
                return None
            spans.append(span)
            if span:  # its last region needs pixels before it, its first needs some after it
                before = max(before, span.stop - self.stride - (middle + phase))
                after = max(after, middle + phase - (span.start + self.stride - 1))
        self._check_seen(spans)
        self._check_moved(spans[0], spans[-1], axis=axis)
        return before, after

    def reach_in_strides(self, axis: int) -> tuple[int, int] | None:
        """As ``reach``, rounded up: what the nearest of each half reaches in the other."""
        found = []
        for first in (self.length // 2, self.length // 2 + self.stride):
            early = self._touched(axis, slice(None, first))
            late = self._touched(axis, slice(first, None))
            self._check_seen([early, late])
            if late.start == 0 or early.stop >= self.length:
                return None
            found.append(range(late.start, early.stop))
        self._check_moved(*found, axis=axis)
        return early.stop - first, first - late.start

    def _check_seen(self, spans: Sequence[range]) -> None:
        if not any(spans):
            raise BundleError(
                "no output turns NaN when the input does: the network ignores it, or hides NaN"
                " (nan_to_num, masks); take that out of the network"
            )

    def _check_moved(self, span: range, later: range, *, axis: int) -> None:
        if later != range(span.start + self.stride, span.stop + self.stride):
            raise BundleError(
                f"the input moved by the output stride of {self.stride} px does not move the output"
                f" by as much along axis {axis}: state the stride at which the network repeats"
            )

    def _touched(self, axis: int, place: int | slice) -> range:
        """As ``touched`` on a strip, widened to whole strides."""
        span = touched(self.module, self._strip(axis, self.length), axis=axis, place=place)
        down, up = span.start // self.stride, -(-span.stop // self.stride)
        return range(down * self.stride, up * self.stride)

    def _strip(self, axis: int, length: int) -> Tensor:
        """A new (1, bands, *S) ramp from 1 to 2: no constant, whose deviation might divide."""
        width = max(2, -(-_WIDTH_PX // self.stride)) * self.stride
        sides = (length if other == axis else width for other in range(self.dims))
        size = [side + self.endpoint for side in sides]
        parameters = self.module.parameters() if isinstance(self.module, nn.Module) else iter(())
        ramp = torch.linspace(1, 2, self.bands * math.prod(size))
        return ramp.reshape(1, self.bands, *size).to(next(parameters, ramp))


def _run(module: Callable[[Tensor], Tensor], image_BCS: Tensor) -> Tensor:
    """The output, (1, K, *S / n) for one whole n. Raises BundleError."""
    size: Shape = tuple(image_BCS.shape[2:])
    try:
        with torch.inference_mode(), _plain_algorithms():
            output_BKS: object = module(image_BCS)
    except Exception as error:  # somebody's own code: it may raise anything
        problem = problem_of(error)
        raise BundleError(f"the network does not take a strip of {size} px: {problem}") from error
    if not isinstance(output_BKS, Tensor) or output_BKS.ndim != image_BCS.ndim:
        found = tuple(output_BKS.shape) if isinstance(output_BKS, Tensor) else type(output_BKS)
        raise BundleError(
            f"the network must give one tensor of {image_BCS.ndim} axes, found {found}:"
            " wrap it so that it does"
        )
    scale = size[0] // max(1, output_BKS.shape[2])
    if size != tuple(side * scale for side in output_BKS.shape[2:]):
        raise BundleError(
            f"a strip of {size} px gives an output of {tuple(output_BKS.shape[2:])}, not of the"
            " same size or a whole part of it on all axes: pad inside the network"
        )
    return output_BKS


@contextmanager
def _plain_algorithms() -> Iterator[None]:
    """Convolutions as sums of products: those by transform smear NaN over their blocks."""
    backends = torch.backends
    with ExitStack() as stack:
        # To state TF32, as the default does, warns where there is no hardware for it.
        stack.enter_context(backends.mkldnn.flags(enabled=False, allow_tf32=None))
        stack.enter_context(backends.cudnn.flags(enabled=False))
        stack.enter_context(backends.nnpack.flags(enabled=False))
        yield
