"""VGG-16 as it was trained on ImageNet, brought to the layers of DeepLab v1 and v2.

Chen et al. 2015 (arXiv 1412.7062), sections 3.2 and 5: of the 7x7 kernels of fc6 every third row
and column is kept, and of the 4096 filters of fc6 and fc7 as many as the network has, at random.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.errors import BundleError
from pipeline.models.vgg import FC_WIDTH

_FC6, _FC7 = "classifier.0", "classifier.3"
"""Torchvision's keys of the fully connected layers."""

_KERNEL, _STEP = 7, 3


def decimated(
    state: Mapping[str, Tensor], *, imagenet: Mapping[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """The state dict of a network on VGG-16, begun from ImageNet.

    Every branch of v2 begins from the same filters; their dilations and classifiers tell them
    apart. What VGG-16 has no counterpart of, the classifiers above all, stays as it is.

    Args:
        state: of the network with fresh weights.
        imagenet: of torchvision's ``vgg16``, its fully connected layers included. It was trained
            on red, green and blue, as its weights' own transforms scale them: a bundle that begins
            from it states that scaling.
        seed: of the choice of filters.

    Raises:
        BundleError: a weight is missing or of another shape, such as for other bands than three.
    """
    fc = _chosen(imagenet, seed=seed)
    started = {key: _counterpart(key, imagenet, fc, fresh) for key, fresh in state.items()}
    for key, weight in started.items():
        if weight.shape != state[key].shape:
            raise BundleError(
                f"{key} has shape {list(state[key].shape)}, VGG-16's weights for it"
                f" {list(weight.shape)}: they are of three bands and no other network"
            )
    return {key: weight.to(state[key].dtype, copy=True) for key, weight in started.items()}


def _counterpart(
    key: str, imagenet: Mapping[str, Tensor], fc: Mapping[str, Tensor], fresh: Tensor
) -> Tensor:
    """What VGG-16 has for a weight; the fresh one where it has nothing."""
    if key.startswith("backbone."):
        return _weight(imagenet, key.replace("backbone", "features", 1))
    return fc.get(".".join(key.split(".")[-2:]), fresh)


def _chosen(imagenet: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    """fc6 and fc7 as convolutions of 3x3 and 1x1 with ``FC_WIDTH`` filters."""
    weight6, weight7 = _weight(imagenet, f"{_FC6}.weight"), _weight(imagenet, f"{_FC7}.weight")
    bias6, bias7 = _weight(imagenet, f"{_FC6}.bias"), _weight(imagenet, f"{_FC7}.bias")
    generator = torch.Generator().manual_seed(seed)
    rows6, rows7 = (
        torch.randperm(len(bias), generator=generator)[:FC_WIDTH] for bias in (bias6, bias7)
    )
    # A kept filter of fc7 hears of the filters that fc6 keeps, and of no other.
    kernel = weight6[rows6].reshape(FC_WIDTH, -1, _KERNEL, _KERNEL)[..., ::_STEP, ::_STEP]
    return {
        "fc6.weight": kernel,
        "fc6.bias": bias6[rows6],
        "fc7.weight": weight7[rows7][:, rows6, None, None],
        "fc7.bias": bias7[rows7],
    }


def _weight(imagenet: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in imagenet:
        raise BundleError(
            f"VGG-16's weights have no {key}: give torchvision's vgg16 with its classifier"
            " (IMAGENET1K_V1, not IMAGENET1K_FEATURES)"
        )
    return imagenet[key]
