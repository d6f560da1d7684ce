"""What training puts a loss on: every score map of a network, with labels of its size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.models.architecture import Architecture
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.frame import Frame
from pipeline.models.published import published
from pipeline.training.crops import CropSampler, CropSpec, Sample
from pipeline.training.fit import Recipe, StepDone, fit
from pipeline.training.score_loss import score_loss, shrink_labels

NETWORKS = {
    "v1": (published("v1", "vgg16"), [(5, 9)]),
    "v1, its MSc": (replace(published("v1", "vgg16"), multi_scale="features"), [(33, 65)]),
    "v2": (replace(published("v2", "vgg16"), rates=(1,)), [(5, 9)]),
    "v2 at three sizes": (
        replace(published("v2", "vgg16"), rates=(1,), multi_scale="inputs"),
        [(5, 9), (4, 7), (3, 5), (5, 9)],
    ),
    "v3": (published("v3", "slim"), [(32, 64)]),
}


def on_paper(architecture: Architecture) -> DeepLab:
    with torch.device("meta"):
        return build_network(architecture, bands=3, classes=4).train()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_in_training_gives_each_map_of_its_paper(name: str) -> None:
    """A loss of the recipe would be missing, or be taken at another size."""
    architecture, sizes = NETWORKS[name]
    network = on_paper(architecture)
    shape = (32 + network.align_corners, 64 + network.align_corners)
    image_BCS = torch.zeros(2, 3, *shape, device="meta")
    maps = network.score_maps(image_BCS, Frame((0, 0), shape))
    assert [tuple(part.shape) for part in maps] == [(2, 4, *size) for size in sizes]


@pytest.mark.parametrize("size", [(41, 41), (31, 31), (21, 21), (321, 321), (1, 41)])
def test_labels_shrink_to_the_places_of_the_scores(size: tuple[int, int]) -> None:
    """Classes would move by pixels against the image: at 321 px the maps have these sizes."""
    label_BS = torch.arange(321 * 321).reshape(1, 321, 321)
    found_BS = shrink_labels(label_BS, size)
    assert found_BS.shape == (1, *size)
    place = torch.linspace(0, 320, size[0], dtype=torch.float64)
    assert ((found_BS[0, :, 0] // 321 - place).abs() <= 0.5).all()
    place = torch.linspace(0, 320, size[1], dtype=torch.float64)
    assert ((found_BS[0, 0] % 321 - place).abs() <= 0.5).all()
    if size == (41, 41):
        assert torch.equal(found_BS, label_BS[:, ::8, ::8])


def test_the_loss_is_the_sum_over_the_maps() -> None:
    """One scale would outweigh the others, or ignored labels dilute the mean."""
    generator = torch.Generator().manual_seed(0)
    label_BS = torch.randint(0, 3, (2, 17, 17), generator=generator)
    label_BS[:, :8] = 255
    sizes = ((3, 3), (17, 17))
    maps = [torch.randn(2, 3, *size, generator=generator) for size in sizes]
    want = torch.tensor(0.0)
    for scores_BKS, step in zip(maps, (8, 1), strict=True):
        shrunk_BS = label_BS[:, ::step, ::step]
        rows = F.log_softmax(scores_BKS, 1).movedim(1, -1)[shrunk_BS != 255]
        kept = shrunk_BS[shrunk_BS != 255]
        want = want - rows[torch.arange(len(kept)), kept].mean()
    found = score_loss(maps, label_BS, ignore_index=255)
    assert torch.isclose(found, want)


def test_a_map_without_a_labelled_place_adds_nothing() -> None:
    """The mean of nothing is NaN, and so would be every weight after it."""
    label_BS = torch.full((1, 17, 17), 255)
    label_BS[0, 3, 3] = 1
    full_BKS = torch.zeros(1, 2, 17, 17, requires_grad=True)
    coarse_BKS = torch.zeros(1, 2, 3, 3, requires_grad=True)
    found = score_loss([full_BKS, coarse_BKS], label_BS, ignore_index=255)
    assert torch.isclose(found, torch.tensor(2.0).log())
    assert score_loss([coarse_BKS], label_BS, ignore_index=255) == 0


def test_training_hears_of_every_scale() -> None:
    """The maximum alone would teach one scale at each place, which is not the recipe."""
    torch.manual_seed(0)
    architecture = NETWORKS["v2 at three sizes"][0]
    network = build_network(architecture, bands=1, classes=2)
    rng = np.random.default_rng(0)
    label_S = rng.integers(0, 2, (33, 33)).astype(np.uint8)
    sample = Sample(label_S[None].astype(np.float32), label_S)
    spec = CropSpec(crop=(33, 33), batch=1, flips=(), ignore_index=255)
    recipe = Recipe(
        steps=1, optimizer="sgd", lr=1e-4, weight_decay=0.0, precision="fp32", seed=0, threads=1,
        frozen_steps=0, norm_batches=1,
    )  # fmt: skip
    seen: list[StepDone] = []
    fit(network, CropSampler([sample], spec=spec), recipe=recipe, on_step=seen.append)
    # Fresh scores are near 0: each of the four maps adds log 2.
    assert 3.9 * np.log(2) < seen[0].loss < 4.1 * np.log(2)
