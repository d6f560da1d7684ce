"""What a network says of itself, by its layers or by a probe, found once in a process."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import torch
from torch import nn

from pipeline.domain import Reach, Shape
from pipeline.inference.average import Average
from pipeline.inference.live_values import live_px
from pipeline.inference.whole_cost import Trial, trial_of
from pipeline.models.bundle import Bundle
from pipeline.models.chain import Chain
from pipeline.models.context_pool import Context
from pipeline.models.custom_network import CustomNetwork
from pipeline.models.custom_reach import custom_reach, known_probe
from pipeline.models.deeplab import DeepLab
from pipeline.models.receptive_field import reach_of, receptive_field
from pipeline.models.stages import stages_of

_TRACED: dict[tuple[str, Context, int], Traced] = {}
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """A network without its weights."""

    average: Average
    """How the network sees the scene: once, as it is, unless ``average`` says otherwise."""

    exact: bool
    """Whether tiles that read so much agree with the scene."""

    receptive_field: Shape | None
    """Of a coarse logit, per axis, in pixels; image pooling left out. None: the scene.

    Of a network whose layers are not known, of all outputs of a stride.
    """

    body: Chain | Trial
    """Its stages, their weights on torch's meta device; or what it takes where it runs as one."""

    live_px: float
    """Bytes per pixel of the values that live at once in a plain forward, in float32."""

    weight_bytes: int
    """Of all weights, in float32."""

    @property
    def reach(self) -> Reach:
        """What tiles need, in pixels of the scene."""
        return self.average.reach

    def averaged(self, text: str) -> Traced:
        """The same, as ``--average`` asks for it. Raises PlanError."""
        return replace(self, average=Average.named(text, own=self.average.own))


def traced(bundle: Bundle, context: Context) -> Traced:
    """Trace or probe a bundle's network, once in this process. Raises BundleError.

    Both patch torch for all threads: no other may run a network meanwhile.
    """
    # With the time of the file: tracing reads the weights, and finds those that are damaged.
    key = (bundle.digest, context, bundle.weights_file.stat().st_mtime_ns)
    with _LOCK:
        if key not in _TRACED:
            network = bundle.network()
            if isinstance(network, CustomNetwork):
                _TRACED[key] = _probed(network, bundle, context)
            else:
                _TRACED[key] = of_layers(network, context)
        return _TRACED[key]


def of_layers(network: DeepLab, context: Context) -> Traced:
    """What the layers of a network say; its window is taken off but for context ``window``."""
    if context != "window":
        network.pool_over(None)
    chain = stages_of(network)
    return Traced(
        average=Average(own=reach_of(network, context=context)),
        exact=context != "tile" or not network.architecture.pools,
        receptive_field=receptive_field(chain).shape,
        body=chain.moved(_without_values),
        live_px=live_px(network),
        weight_bytes=_weight_bytes(network),
    )


def _probed(network: CustomNetwork, bundle: Bundle, context: Context) -> Traced:
    found = known_probe(network)
    halo, field = found.halo, None
    if halo is not None:
        sides = zip(halo.before, halo.after, strict=True)
        field = tuple(before + network.stride + after for before, after in sides)
    trial = trial_of(network)
    return Traced(
        average=Average(own=custom_reach(network, found, crop=bundle.crop, context=context)),
        exact=halo is not None,
        receptive_field=field,
        body=trial,
        live_px=trial.bytes_px,
        weight_bytes=_weight_bytes(network),
    )


def _weight_bytes(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters()) * 4


def _without_values(weight: torch.Tensor) -> torch.Tensor:
    return weight.to("meta")
