"""A bundle of somebody's own network."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import BundleError
from pipeline.models.bundle import Bundle, CustomArchitecture, save_bundle

if TYPE_CHECKING:
    from torch import Tensor


def save_custom(path: str | Path, bundle: Bundle, weights: Mapping[str, Tensor] | bytes) -> Bundle:
    """Write a bundle of family ``custom`` once its network has run and been probed; return it.

    Args:
        path: directory of the bundle.
        bundle: what it says, but for the halo, which is put in as the probe finds it.
        weights: state dict of the entry point's network, or a program as ``torch.export.save``
            writes it.

    Raises:
        BundleError: the network cannot be made, or is not what the bundle says; nothing is written.
    """
    from pipeline.models.custom_network import CustomNetwork
    from pipeline.models.custom_reach import probe_custom

    architecture = bundle.architecture
    if not isinstance(architecture, CustomArchitecture):
        raise BundleError(f"{bundle.name} is of family {architecture.family}, not custom")
    with tempfile.TemporaryDirectory() as scratch:
        network = save_bundle(Path(scratch) / "draft", bundle, weights).network()
    assert isinstance(network, CustomNetwork)
    found = replace(architecture, halo=probe_custom(network).halo)
    return save_bundle(path, replace(bundle, architecture=found), weights)
