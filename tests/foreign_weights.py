"""Our networks' weights as somebody else would have saved them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.models.deeplab import DeepLab
from pipeline.models.layouts.layout import Layout, their_name
from pipeline.models.layouts.tensorflow_layout import Tensorflow


def abroad(layout: Layout, network: DeepLab, *, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of ``network`` in a layout; ``like`` has a name that tells its variant."""
    architecture = network.architecture
    modules, moved = layout.modules(architecture, like), layout.moved(architecture)
    found = {}
    for ours, weight in network.state_dict().items():
        owner, _, parameter = ours.rpartition(".")
        theirs = their_name(owner, modules)
        if theirs is None or (
            parameter == "num_batches_tracked" and isinstance(layout, Tensorflow)
        ):
            continue
        module = network.get_submodule(owner)
        if parameter == "weight" and owner in moved:
            weight = weight.roll(moved[owner], dims=1)
        if isinstance(layout, Tensorflow) and weight.ndim == 4:
            depthwise = module.groups > 1
            weight = weight.permute(2, 3, 0, 1) if depthwise else weight.permute(2, 3, 1, 0)
        found[layout.key(module, theirs, parameter)] = weight
    return found
