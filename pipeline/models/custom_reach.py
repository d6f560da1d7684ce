"""How far somebody's own network reaches: asked of it by NaN, for its layers are not known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

from pipeline.domain import Halo, Reach
from pipeline.errors import BundleError
from pipeline.models.context_pool import Context
from pipeline.models.custom_network import CustomNetwork
from pipeline.models.nan_probe import Probe, probe_halves, probe_network

_FIRST_PX = MappingProxyType({2: 1024, 3: 192})
_MOST_PX = MappingProxyType({2: 8192, 3: 768})
"""Length of the first and the longest strips, in pixels, by number of axes.

What fills the longest is GLOBAL.
"""

_NAMED = 3
"""Layers that are named to a person; ``model probe`` lists them all."""

_ROOM = 4
"""Strips are so many times as long as what is found: a lone tap further out is not overlooked."""


def probe_custom(network: CustomNetwork) -> Probe:
    """The probe, in whole strides, over strips as long as it takes.

    Layers have the names that they have in the module. Raises BundleError.
    """
    dims, stride = network.architecture.dims, network.stride
    length = -(-_FIRST_PX[dims] // (4 * stride)) * 4 * stride
    found = probe_network(network, most_px=length, by=probe_halves)
    while _cramped(found, length) and 2 * length <= _MOST_PX[dims]:
        length *= 2
        found = probe_network(network, most_px=length, by=probe_halves)
    return replace(found, layers=tuple(name.removeprefix("module.") for name in found.layers))


def known_probe(network: CustomNetwork) -> Probe:
    """What the bundle states of a probe that it remembers, else the probe. Raises BundleError."""
    halo, stride = network.architecture.halo, network.stride
    if halo is None:
        return probe_custom(network)
    return Probe(stride=stride, before=halo.before, after=halo.after)


def custom_reach(
    network: CustomNetwork, found: Probe, *, crop: Sequence[int], context: Context
) -> Reach:
    """The reach of a network that was probed, in pixels.

    With context ``tile`` one that is GLOBAL sees half its training crop around a tile: it is not
    exact, and what it then says of a place depends on the tile.

    Raises:
        BundleError: it is GLOBAL, so that no halo makes its tiles agree.
    """
    halo = found.halo
    if halo is None and context != "tile":
        more = [f"{len(found.layers) - _NAMED} more"] if len(found.layers) > _NAMED else []
        layers = ", ".join([*found.layers[:_NAMED], *more]) or "no single layer"
        raise BundleError(
            f"the network is GLOBAL, {layers} at fault: every output depends on all of the input,"
            " so that no halo makes its tiles agree; --context tile runs it, not exactly"
        )
    half = tuple(-(-side // 2) for side in crop)
    return Reach(stride=network.stride, halo=(halo or Halo(half, half)).round_up(network.stride))


def _cramped(found: Probe, length: int) -> bool:
    return found.halo is None or _ROOM * found.halo.largest > length
