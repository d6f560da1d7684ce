"""``model show``, ``model new`` and ``model probe``."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline.domain import Halo, Reach
from pipeline.errors import BundleError
from pipeline.models.baselines import BASELINES, baseline
from pipeline.models.bundle import (
    MODEL_FILE,
    Architecture,
    Bundle,
    CustomArchitecture,
    load_bundle,
)
from pipeline.models.chain import Chain
from pipeline.models.custom_network import CustomNetwork
from pipeline.models.custom_reach import known_probe, probe_custom
from pipeline.models.deeplab import DeepLab
from pipeline.models.fresh import new_bundle
from pipeline.models.nan_probe import Probe, probe_network
from pipeline.models.published import published
from pipeline.models.receptive_field import local_halo, reach_of
from pipeline.models.stages import stages_of

_TRUNKS = MappingProxyType(
    {"v1": "vgg16", "v2": "resnet101", "fcn": "resnet50", "segnet": "vgg16", "unet": "resnet18"}
)
"""What a family is built on where nothing is said; the others on ``slim``."""


def describe(path: Path) -> dict[str, Any]:
    """A bundle in words: network, classes, input, halo (None: GLOBAL), size. Raises BundleError."""
    bundle = load_bundle(path)
    network = bundle.network()
    reach = _reach(network)
    return {
        "name": bundle.name,
        "version": bundle.version,
        "architecture": asdict(bundle.architecture),
        "parameters": sum(p.numel() for p in network.parameters()),
        "bands": bundle.input.bands,
        "classes": [f"{c.id} {c.name} {c.color}" for c in bundle.classes],
        "pixel_size_m": bundle.input.pixel_size_m,
        "spacing_mm": bundle.input.spacing_mm,
        "output_stride": bundle.architecture.output_stride,
        "halo_before": reach.halo.before if reach else None,
        "halo_after": reach.halo.after if reach else None,
        "context_window": reach.window.size if reach and reach.window else None,
        "crf": bundle.crf,
        "training": dict(bundle.training),
        "digest": bundle.digest,
    }


def create(
    *,
    output: Path,
    family: str,
    backbone: str | None,
    dims: int,
    slice_ratio: float | None = None,
    bands: int,
    classes: int,
    output_stride: int | None,
    seed: int,
    multi_scale: bool = False,
    slice_stride: int | None = None,
) -> Bundle:
    """Write an untrained bundle.

    Raises BundleError for a network that does not exist, and in place of a trained one.
    """
    if (output / MODEL_FILE).exists() and load_bundle(output).training.get("steps") != 0:
        raise BundleError(
            f"output {output} is a bundle with weights that were trained: choose another directory,"
            " or delete it"
        )
    trunk = backbone or _TRUNKS.get(family, "slim")
    form = ("features" if family == "v1" else "inputs") if multi_scale else None
    changes: dict[str, Any] = {
        "multi_scale": form,
        "slice_ratio": slice_ratio,
        "slice_stride": slice_stride,
    }
    asked = {key: value for key, value in changes.items() if value is not None}
    architecture: Architecture | CustomArchitecture
    if family in BASELINES:
        if asked or output_stride is not None:
            given = ", ".join([*asked, *["output_stride"] * (output_stride is not None)])
            raise BundleError(
                f"family {family} has a stride of its own and no options: {given} asked"
            )
        architecture = baseline(family, trunk, dims=dims, bands=bands, classes=classes)
    else:
        architecture = published(family, trunk, dims=dims, output_stride=output_stride)
        architecture = replace(architecture, **asked)
    return new_bundle(output, architecture=architecture, bands=bands, classes=classes, seed=seed)


def probe_bundle(path: Path) -> dict[str, Any]:
    """How far a bundle's network reaches: by arithmetic over its layers, and as NaN shows it.

    ``problem`` is a line where the arithmetic, which the halo comes from, says too little; else
    None. Raises BundleError, also for a network that one of the two cannot follow. There is no
    arithmetic for somebody's own network.
    """
    network = load_bundle(path).network()
    if isinstance(network, CustomNetwork):
        return _probed(network)
    squeezes = network.architecture.squeezes
    # Of squeezes no end is claimed: all but they are followed, and the probe shall find them.
    reach = reach_of(network, context="tile" if squeezes else "window")
    interval, halo = _interval(stages_of(network), reach), reach.halo_with_window
    # Half a window is in the halo; near the strip's ends windows are shifted by up to the rest.
    window = max(reach.window.size, default=0) if reach.window else 0
    found = probe_network(network, most_px=2 * halo.largest + window + 64 * reach.stride)
    return {
        "output_stride": reach.stride,
        "interval_before": interval.before,
        "interval_after": interval.after,
        "probe_before": found.before,
        "probe_after": found.after,
        "verdict": "LOCAL" if found.halo else "GLOBAL",
        "layers_at_fault": found.layers,
        "halo_before": None if squeezes else halo.before,
        "halo_after": None if squeezes else halo.after,
        "problem": None if squeezes else _problem(found, interval),
    }


def _probed(network: CustomNetwork) -> dict[str, Any]:
    found = probe_custom(network)
    halo = found.halo and found.halo.round_up(network.stride)
    return {
        "output_stride": network.stride,
        "interval_before": None,
        "interval_after": None,
        "probe_before": found.before,
        "probe_after": found.after,
        "verdict": "LOCAL" if halo else "GLOBAL",
        "layers_at_fault": found.layers,
        "halo_before": halo.before if halo else None,
        "halo_after": halo.after if halo else None,
        "problem": _understated(found, network.architecture.halo),
    }


def _understated(found: Probe, stated: Halo | None) -> str | None:
    if stated is None or (found.halo is not None and found.halo | stated == stated):
        return None
    return (
        f"a NaN reaches {found.before} px before and {found.after} px after a region (None: no"
        f" end), the bundle says {stated.before} and {stated.after} px: save it again"
    )


def _reach(network: DeepLab | CustomNetwork) -> Reach | None:
    """As it is tiled; None for one that is GLOBAL."""
    if not isinstance(network, CustomNetwork):
        return None if network.architecture.squeezes else reach_of(network)
    halo = known_probe(network).halo
    return Reach(stride=network.stride, halo=halo.round_up(network.stride)) if halo else None


def _interval(chain: Chain, reach: Reach) -> Halo:
    """The reach that the arithmetic finds far from the scene's border, not rounded to strides."""
    halo, window = local_halo(chain), reach.window
    return (
        halo
        if window is None
        else halo | (window.inner + Halo(window.half, window.half) + window.outer)
    )


def _problem(found: Probe, interval: Halo) -> str | None:
    if found.halo is None:
        layers = ", ".join(found.layers) or "no single layer"
        return (
            f"the network is GLOBAL ({layers} at fault), the arithmetic says it is local:"
            " do not tile it"
        )
    if found.halo | interval == interval:
        return None
    return (
        f"a NaN reaches {found.before} px before and {found.after} px after a region, the"
        f" arithmetic says {interval.before} and {interval.after} px: the halo is too short, do"
        " not tile this network"
    )
