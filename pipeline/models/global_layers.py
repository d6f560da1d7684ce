"""Layers whose every output depends on all of their input, so that no halo makes tiles agree."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import fx, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from torchvision.ops import SqueezeExcitation

_LAYERS = (
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.MultiheadAttention,
)

_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_FUNCTIONS = (
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
    F.adaptive_max_pool2d,
    F.adaptive_max_pool3d,
    F.group_norm,
    F.instance_norm,
    F.layer_norm,
    F.scaled_dot_product_attention,
)
_REDUCTIONS = (torch.mean, torch.sum, torch.amax, "mean", "sum", "amax")


def is_global_layer(layer: nn.Module) -> bool:
    """Whether the layer by itself takes means over all that is read."""
    return isinstance(layer, _LAYERS) or is_squeeze_excitation(layer)


def is_squeeze_excitation(layer: nn.Module | None) -> TypeGuard[SqueezeExcitation]:
    """Whether it is torchvision's, which is imported only by networks that come from there."""
    ops = sys.modules.get("torchvision.ops")
    return ops is not None and isinstance(layer, ops.SqueezeExcitation)


def mixes_scene(node: fx.Node, layer: nn.Module | None) -> bool:
    """Whether a traced operation, ``layer`` where it is a module, is known to be global."""
    if isinstance(layer, _NORMS):
        # Without statistics of training it takes those of its input, in eval mode, too.
        return not layer.track_running_stats
    if layer is not None:
        return is_global_layer(layer)
    return node.target in _FUNCTIONS or (node.target in _REDUCTIONS and _spatial(node))


def layer_label(node: fx.Node, layer: nn.Module | None) -> str:
    """The layer's name and type for people; of a function those of the module that calls it."""
    if layer is not None:
        return f"{node.target} ({type(layer).__name__})"
    name = getattr(node.target, "__name__", str(node.target))
    owners = list(node.meta.get("nn_module_stack", {}).values())
    return f"{owners[-1][0]} ({owners[-1][1].__name__}, {name})" if owners else name


def _spatial(node: fx.Node) -> bool:
    """Whether a reduction goes over more than batch and channels."""
    dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    axes = (dim,) if isinstance(dim, int) else dim
    return axes is None or not set(axes) <= {0, 1}
