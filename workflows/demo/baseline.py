"""A classifier that sees one pixel at a time: what the network has to beat.

Gaussian maximum likelihood, remote sensing's own classic. Axes: C channel, K class, S space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workflows.demo.landscape import CLASSES as SCENE_CLASSES
from workflows.demo.landscape import Labelled, scattered
from workflows.demo.scene import TRAINING_SEED
from workflows.demo.volume import CLASSES as BRAIN_CLASSES
from workflows.demo.volume import BrainVolume


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GaussianClassifier:
    """A Gaussian per class over the bands, and how frequent each class is."""

    mean_KC: NDArray[np.float64]
    whitener_KCC: NDArray[np.float64]
    """Inverse of the Cholesky factor of each class's covariance."""

    offset_K: NDArray[np.float64]
    """Log prior less half the log determinant."""

    @classmethod
    def fit(cls, pixels: Sequence[Labelled], *, classes: int) -> GaussianClassifier:
        """Fit to images and their class ids 0..classes-1; other ids are left out."""
        bands_CN = np.concatenate([i.reshape(len(i), -1) for i, _ in pixels], axis=1)
        label_N = np.concatenate([label.ravel() for _, label in pixels])
        means, whiteners, offsets = [], [], []
        for k in range(classes):
            class_CN = bands_CN[:, label_N == k].astype(np.float64)
            # One grey level of variance keeps a class of one single value usable.
            covariance = np.cov(class_CN).reshape(len(class_CN), -1) + np.eye(len(class_CN))
            factor = np.linalg.cholesky(covariance)
            means.append(class_CN.mean(axis=1))
            whiteners.append(np.linalg.inv(factor))
            offsets.append(np.log(class_CN.shape[1]) - np.log(np.diag(factor)).sum())
        return cls(
            mean_KC=np.stack(means), whitener_KCC=np.stack(whiteners), offset_K=np.array(offsets)
        )

    def predict(self, image_CS: NDArray[Any]) -> NDArray[np.uint8]:
        """The likeliest class of each pixel, (*S) uint8; a new array."""
        bands_CN = image_CS.reshape(len(image_CS), -1).astype(np.float32)
        score_KN = np.empty((len(self.offset_K), bands_CN.shape[1]), np.float32)
        for k, offset in enumerate(self.offset_K):
            centred_CN = bands_CN - self.mean_KC[k].astype(np.float32)[:, None]
            distance_CN = self.whitener_KCC[k].astype(np.float32) @ centred_CN
            score_KN[k] = np.float32(offset) - (distance_CN**2).sum(axis=0) / 2
        label_N: NDArray[np.uint8] = score_KN.argmax(axis=0).astype(np.uint8)
        return label_N.reshape(image_CS.shape[1:])


def fit_to_scene() -> GaussianClassifier:
    """The per-pixel classifier of the demo scene, fitted to the landscape trained on."""
    pixels = scattered(8, side=512, seed=TRAINING_SEED)
    return GaussianClassifier.fit(pixels, classes=len(SCENE_CLASSES))


def fit_to_volume(brain: BrainVolume) -> GaussianClassifier:
    """The per-voxel classifier of T1 intensity, fitted to the half of the brain trained on."""
    return GaussianClassifier.fit([brain.part(brain.trained)], classes=len(BRAIN_CLASSES))
