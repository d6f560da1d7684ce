"""What the layers of a network say of it, found once in a process."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from pipeline.domain import Reach, Region
from pipeline.models.bundle import WEIGHTS_FILE, Bundle
from pipeline.models.chain import Chain
from pipeline.models.context_pool import Context
from pipeline.models.receptive_field import reach_of, receptive_field
from pipeline.models.stages import stages_of

_TRACED: dict[tuple[str, Context, int], Traced] = {}
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """A network without its weights."""

    reach: Reach

    field: Region
    """What coarse logit 0 needs of the image, image pooling left out."""

    chain: Chain
    """Its stages, their weights on torch's meta device."""

    weight_bytes: int
    """Of all weights, in float32."""

    @property
    def receptive_field(self) -> tuple[int, ...]:
        """Of a coarse logit, per axis, in pixels; image pooling left out."""
        return self.field.shape


def traced(bundle: Bundle, context: Context) -> Traced:
    """Trace a bundle's network, once in this process. Raises BundleError.

    Tracing patches torch for all threads: no other may run a network meanwhile.
    """
    # With the time of the file: tracing reads the weights, and finds those that are damaged.
    key = (bundle.digest, context, (bundle.path / WEIGHTS_FILE).stat().st_mtime_ns)
    with _LOCK:
        if key not in _TRACED:
            network = bundle.network()
            if context != "window":
                network.pool_over(None)
            chain = stages_of(network)
            _TRACED[key] = Traced(
                reach=reach_of(network, context=context),
                field=receptive_field(chain),
                chain=chain.moved(_without_values),
                weight_bytes=sum(p.numel() for p in network.parameters()) * 4,
            )
        return _TRACED[key]


def _without_values(weight: torch.Tensor) -> torch.Tensor:
    return weight.to("meta")
