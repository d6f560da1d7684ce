"""How far somebody's own network reaches: asked of it by NaN, for its layers are not known."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from pipeline.domain import Halo, Reach
from pipeline.errors import BundleError
from pipeline.models.context_pool import Context
from pipeline.models.custom_network import CustomNetwork
from pipeline.models.nan_probe import Probe, probe_network

_FIRST = 16
"""Length of the first strips, in strides."""

_MOST_PX = MappingProxyType({2: 4096, 3: 512})
"""Length of the longest strips, in pixels, by number of axes: what fills them is GLOBAL."""


def probe_custom(network: CustomNetwork) -> Probe:
    """The probe over strips as long as it takes. Raises BundleError."""
    most_px = _MOST_PX[network.architecture.dims]
    length = min(_FIRST * network.stride, most_px)
    found = probe_network(network, most_px=length)
    while found.halo is None and 2 * length <= most_px:
        length *= 2
        found = probe_network(network, most_px=length)
    return found


def custom_reach(
    network: CustomNetwork, found: Probe, *, crop: Sequence[int], context: Context
) -> Reach:
    """The reach of a network that was probed, in pixels.

    With context ``tile`` one that is GLOBAL sees half its training crop around a tile: it is not
    exact, and what it then says of a place depends on the tile.

    Raises:
        BundleError: it is GLOBAL, so that no halo makes its tiles agree.
    """
    if found.halo is not None:
        return Reach(stride=network.stride, halo=found.halo.round_up(network.stride))
    if context != "tile":
        layers = ", ".join(found.layers).replace("module.", "") or "no single layer"
        raise BundleError(
            f"the network is GLOBAL, {layers} at fault: every output depends on all of the input,"
            " so that no halo makes its tiles agree; --context tile runs it, not exactly"
        )
    half = tuple(-(-side // 2) for side in crop)
    return Reach(stride=network.stride, halo=Halo(half, half).round_up(network.stride))
