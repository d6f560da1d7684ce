"""``model show`` and ``model new``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.models.architecture import STRIDES, Architecture
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.models.fresh import new_bundle
from pipeline.models.receptive_field import reach_of


def describe(path: Path) -> dict[str, Any]:
    """A bundle in words: network, classes, input, halo, size. Raises BundleError."""
    bundle = load_bundle(path)
    network = bundle.network()
    reach = reach_of(network)
    return {
        "name": bundle.name,
        "version": bundle.version,
        "architecture": asdict(bundle.architecture),
        "parameters": sum(p.numel() for p in network.parameters()),
        "bands": bundle.input.bands,
        "classes": [f"{c.id} {c.name} {c.color}" for c in bundle.classes],
        "pixel_size_m": bundle.input.pixel_size_m,
        "spacing_mm": bundle.input.spacing_mm,
        "output_stride": reach.stride,
        "halo_before": reach.halo.before,
        "halo_after": reach.halo.after,
        "context_window": reach.window.size if reach.window else None,
        "crf": bundle.crf,
        "training": dict(bundle.training),
        "digest": bundle.digest,
    }


def create(
    *,
    output: Path,
    family: str,
    backbone: str,
    dims: int,
    bands: int,
    classes: int,
    output_stride: int | None,
    seed: int,
) -> Bundle:
    """Write an untrained bundle. Raises BundleError for a network that does not exist."""
    strides = STRIDES.get((backbone, dims), (8,))
    stride = output_stride or strides[0]
    resnet = backbone.startswith("resnet")
    slim = (2, 4, 6) if stride == strides[0] else (1, 2)
    architecture = Architecture(
        family=family,
        backbone=backbone,
        dims=dims,
        output_stride=stride,
        rates=(12, 24, 36) if resnet else slim,
        image_pooling=resnet,
    )
    return new_bundle(output, architecture=architecture, bands=bands, classes=classes, seed=seed)
