"""The rival that needs no tool: torch over a whole scene at once, read and written with rasterio.

Run as ``python -m benchmarks.whole_pass SCENE BUNDLE OUTPUT``, in a process of its own.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import rasterio
import torch
from torch import Tensor

from pipeline.models.bundle import Bundle, load_bundle
from pipeline.models.deeplab import DeepLab
from pipeline.models.frame import Frame


def read_scene(path: str, bundle: Bundle) -> tuple[Tensor, dict[str, Any]]:
    """The image (1, C, *S) float32, scaled as the bundle says, and the profile of its file."""
    with rasterio.open(path) as source:
        image, profile = source.read(out_dtype="float32"), source.profile
    scaling = bundle.input.scaling
    return torch.from_numpy(image).sub_(scaling.mean[0]).div_(scaling.std[0])[None], profile


def write_labels(path: str, logits_KS: Tensor, profile: dict[str, Any]) -> None:
    """The best class of each pixel, as a GeoTIFF on the scene's grid."""
    labels = logits_KS.argmax(0).to(torch.uint8).numpy()
    with rasterio.open(path, "w", **(profile | {"count": 1, "dtype": "uint8", "nodata": 255})) as f:
        f.write(labels, 1)


def predict(network: DeepLab, image_BCS: Tensor) -> Tensor:
    """Logits (B, K, *S) of an image that is taken for a whole scene."""
    logits_BKS: Tensor = network(image_BCS, Frame((0, 0), tuple(image_BCS.shape[2:])))
    return logits_BKS


def main() -> None:
    """Segment a scene."""
    scene, model, output = sys.argv[1:]
    torch.set_num_threads(os.cpu_count() or 1)
    bundle = load_bundle(model)
    network = bundle.network().to(memory_format=torch.channels_last)
    image_BCS, profile = read_scene(scene, bundle)
    with torch.inference_mode():
        image_BCS = image_BCS.contiguous(memory_format=torch.channels_last)
        write_labels(output, predict(network, image_BCS)[0], profile)


if __name__ == "__main__":
    main()
