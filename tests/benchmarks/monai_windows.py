"""The rival that blends: MONAI's sliding windows of 512 px over a scene that is held in memory.

Run as ``python -m benchmarks.monai_windows SCENE BUNDLE OUTPUT OVERLAP MODE LAYOUT``, in a process
of its own; MODE is ``gaussian`` or ``constant``, LAYOUT ``channels_last`` or ``contiguous_format``.
"""

from __future__ import annotations

import os
import sys

import torch
from benchmarks.whole_pass import predict, read_scene, write_labels
from torch import Tensor

from pipeline.models.bundle import load_bundle
from pipeline.models.deeplab import DeepLab

ROI = (512, 512)
"""Of one window, in px: the crop of the networks compared, so that image pooling sees as much."""


def blend(network: DeepLab, image_BCS: Tensor, *, overlap: float, mode: str) -> Tensor:
    """Logits (B, K, *S), blended from windows that overlap by this share."""
    # Here: tests collect this module where the extra ``bench`` is not installed.
    from monai.inferers import sliding_window_inference

    def window(part_BCS: Tensor) -> Tensor:
        return predict(network, part_BCS)

    with torch.inference_mode():
        logits_BKS = sliding_window_inference(
            image_BCS, ROI, sw_batch_size=1, predictor=window, overlap=overlap, mode=mode
        )
    assert isinstance(logits_BKS, Tensor)
    return logits_BKS


def main() -> None:
    """Segment a scene."""
    scene, model, output, overlap, mode, layout = sys.argv[1:]
    torch.set_num_threads(os.cpu_count() or 1)
    bundle = load_bundle(model)
    network = bundle.network().to(memory_format=getattr(torch, layout))
    image_BCS, profile = read_scene(scene, bundle)
    image_BCS = image_BCS.contiguous(memory_format=getattr(torch, layout))
    logits_BKS = blend(network, image_BCS, overlap=float(overlap), mode=mode)
    write_labels(output, logits_BKS[0], profile)


if __name__ == "__main__":
    main()
