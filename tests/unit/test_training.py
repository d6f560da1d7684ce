"""Crops and the training loop, on data small enough to be learned in seconds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import SourceError
from pipeline.models.bundle import Architecture
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.frame import Frame
from pipeline.training.crops import CropSampler, CropSpec, Sample
from pipeline.training.fit import Recipe, StepDone, fit, settle_norms

SPEC = CropSpec(crop=(16, 16), batch=4, flips=(0, 1), ignore_index=255)
RECIPE = Recipe(
    steps=30,
    optimizer="adamw",
    lr=5e-3,
    weight_decay=1e-4,
    precision="fp32",
    seed=0,
    threads=1,
    frozen_steps=10,
    norm_batches=4,
)


def coordinates(*shape: int) -> Sample:
    """An image whose two bands are the row and the column; labels are 0 but for one pixel of 1."""
    rows, columns = np.indices(shape, dtype=np.float32)
    label = np.zeros(shape, np.uint8)
    label[-1, 3] = 1
    return Sample(np.stack([rows, columns]), label)


def blobs(*, seed: int, size: int = 64) -> Sample:
    """Two classes that differ in their mean, under noise."""
    rng = np.random.default_rng(seed)
    label = np.kron(rng.integers(0, 2, (size // 16, size // 16)), np.ones((16, 16))).astype(
        np.uint8
    )
    image = label + rng.normal(0, 0.7, (2, size, size))
    return Sample(image.astype(np.float32), label)


def slim() -> DeepLab:
    torch.manual_seed(0)
    architecture = Architecture(
        family="v3", backbone="slim", dims=2, output_stride=4, rates=(2, 4), image_pooling=False
    )
    return build_network(architecture, bands=2, classes=2)


def trained(recipe: Recipe, *, losses: list[float]) -> dict[str, torch.Tensor]:
    def note(done: StepDone) -> None:
        losses.append(done.loss)

    network = slim()
    sampler = CropSampler([blobs(seed=1), blobs(seed=2)], spec=SPEC)
    fit(network, sampler, recipe=recipe, on_step=note)
    return network.state_dict()


def test_image_and_label_are_cut_and_flipped_alike() -> None:
    """A network trained on labels of other pixels learns nothing, silently."""
    sample = coordinates(40, 50)
    marked = Sample(sample.image_CS, (sample.image_CS.sum(axis=0) % 7).astype(np.uint8))
    image_BCS, label_BS = CropSampler([marked], spec=SPEC).draw(np.random.default_rng(0))
    assert image_BCS.shape == (4, 2, 16, 16)
    assert np.array_equal(image_BCS.sum(axis=1) % 7, label_BS)


def test_only_the_axes_named_are_flipped() -> None:
    """A brain would be trained upside down."""
    sampler = CropSampler([coordinates(40, 50)], spec=replace(SPEC, flips=(1,), batch=32))
    image_BCS, _ = sampler.draw(np.random.default_rng(0))
    assert (np.diff(image_BCS[:, 0], axis=1) == 1).all()
    steps = np.diff(image_BCS[:, 1], axis=2)[:, 0, 0]
    assert set(steps) == {-1.0, 1.0}


def test_every_class_is_looked_at_equally_often() -> None:
    """One diseased pixel among thousands would otherwise never be met."""
    sampler = CropSampler([coordinates(200, 200)], spec=replace(SPEC, batch=64))
    _, label_BS = sampler.draw(np.random.default_rng(0))
    with_rare = (label_BS == 1).any(axis=(1, 2)).mean()
    assert 0.3 < with_rare < 0.7


def test_crops_reach_every_corner_of_every_sample() -> None:
    """Pixels that are never seen would never be learned."""
    samples = [coordinates(20, 24), coordinates(18, 16)]
    sampler = CropSampler(samples, spec=replace(SPEC, flips=(), batch=200))
    image_BCS, _ = sampler.draw(np.random.default_rng(0))
    assert image_BCS[:, 0].max() == 19
    assert image_BCS[:, 1].max() == 23
    assert image_BCS.min() == 0


def test_ignored_pixels_are_never_the_reason_for_a_crop() -> None:
    """Crops of clouds alone have no labelled pixel, and so no loss: NaN weights."""
    sample = coordinates(64, 64)
    label = np.full((64, 64), 255, np.uint8)
    label[60:, 60:] = 0
    _, label_BS = CropSampler([Sample(sample.image_CS, label)], spec=SPEC).draw(
        np.random.default_rng(0)
    )
    assert (label_BS != 255).any(axis=(1, 2)).all()


def test_samples_that_cannot_be_cropped_are_refused() -> None:
    """Too small, unlabelled or mismatched data must be named before an hour of training."""
    with pytest.raises(SourceError, match="smaller crop"):
        CropSampler([coordinates(8, 40)], spec=SPEC)
    empty = Sample(np.zeros((2, 20, 20), np.float32), np.full((20, 20), 255, np.uint8))
    with pytest.raises(SourceError, match="nothing can be learned"):
        CropSampler([empty], spec=SPEC)
    with pytest.raises(SourceError, match="one grid"):
        Sample(np.zeros((2, 20, 20), np.float32), np.zeros((20, 21), np.uint8))


def test_the_loss_falls_and_held_back_pixels_are_told_apart() -> None:
    """Training that does not train; batch norm left in training mode would also fail here."""
    losses: list[float] = []
    network = slim()
    network.load_state_dict(trained(RECIPE, losses=losses))
    assert len(losses) == RECIPE.steps
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])
    unseen = blobs(seed=3)
    with torch.no_grad():
        logits = network.eval()(torch.from_numpy(unseen.image_CS)[None], Frame((0, 0), (64, 64)))
    accuracy = (logits[0].argmax(dim=0).numpy() == unseen.label_S).mean()
    assert accuracy > max(unseen.label_S.mean(), 1 - unseen.label_S.mean()) + 0.15


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_same_recipe_gives_the_same_weights(optimizer: str) -> None:
    """Bundles could not be reproduced; dropout draws from torch's own generator."""
    recipe = replace(RECIPE, steps=4, optimizer=optimizer, lr=1e-2, frozen_steps=1, norm_batches=2)
    first = trained(recipe, losses=[])
    torch.manual_seed(99)
    second = trained(recipe, losses=[])
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = trained(replace(recipe, seed=1), losses=[])
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_training_leaves_the_callers_random_state_and_threads_alone() -> None:
    """A test or a tracker that draws numbers would depend on how long training was."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    network = slim()
    torch.set_rng_state(state)
    sampler = CropSampler([blobs(seed=1)], spec=SPEC)
    fit(network, sampler, recipe=replace(RECIPE, steps=2, frozen_steps=0), on_step=lambda _: None)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_norm_statistics_are_those_of_the_data_afterwards() -> None:
    """Running averages lag behind; eval mode would then see other features than training did."""

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, image_BCS: torch.Tensor, frame: Frame) -> torch.Tensor:
            return self.norm(image_BCS)

    rng = np.random.default_rng(0)
    image = (rng.normal(0, 3, (2, 16, 16)) + 5).astype(np.float32)
    sampler = CropSampler([Sample(image, np.zeros((16, 16), np.uint8))], spec=SPEC)
    probe = Probe()
    settle_norms(probe, sampler, rng=rng, batches=3)
    assert probe.norm.running_mean.numpy() == pytest.approx(image.mean(axis=(1, 2)), rel=1e-5)
    assert probe.norm.running_var.numpy() == pytest.approx(image.var(axis=(1, 2)), rel=1e-2)
    assert probe.norm.momentum == 0.1


@pytest.mark.parametrize("frozen_steps", [0, 6])
def test_eval_mode_sees_the_statistics_that_the_last_steps_saw(frozen_steps: int) -> None:
    """A network that leans on the statistics of its batch falls apart on a whole scene."""
    held: list[torch.Tensor] = []
    network = slim()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    fit(
        network,
        CropSampler([blobs(seed=1)], spec=SPEC),
        recipe=replace(RECIPE, steps=12, frozen_steps=frozen_steps),
        on_step=lambda _: held.append(norms[-1].running_mean.clone()),
    )
    same = [torch.equal(mean, norms[-1].running_mean) for mean in held]
    assert same == [False] * (12 - frozen_steps) + [True] * frozen_steps
    assert not any(module.training for module in network.modules())


def test_volumes_are_trained_on_as_pictures_are() -> None:
    """The loop must not know the number of axes."""
    torch.manual_seed(0)
    architecture = Architecture(
        family="v3", backbone="slim", dims=3, output_stride=4, rates=(1,), image_pooling=False
    )
    network = build_network(architecture, bands=1, classes=2)
    rng = np.random.default_rng(0)
    label = (np.indices((20, 20, 20))[0] >= 10).astype(np.uint8)
    image = (label + rng.normal(0, 0.3, label.shape)).astype(np.float32)[None]
    spec = CropSpec(crop=(12, 12, 12), batch=2, flips=(2,), ignore_index=255)
    losses: list[float] = []
    fit(
        network,
        CropSampler([Sample(image, label)], spec=spec),
        recipe=replace(RECIPE, steps=12, frozen_steps=4, norm_batches=2),
        on_step=lambda done: losses.append(done.loss),
    )
    assert losses[-1] < losses[0]
