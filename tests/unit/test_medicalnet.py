"""Volume trunks: against the figures of the published networks, and in tiles of thick slices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import fresh

from pipeline.domain import Grid, Halo, Region
from pipeline.errors import BundleError
from pipeline.inference.precision import Precision
from pipeline.inference.predictor import Predictor
from pipeline.models.architecture import Architecture
from pipeline.models.bundle import save_bundle
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.frame import Frame
from pipeline.models.medicalnet import MedicalNetTrunk
from pipeline.models.published import published
from pipeline.models.receptive_field import reach_of
from pipeline.models.stages import stages_of
from workflows.tracing import of_layers


def volume_network(
    depth: int, *, rates: tuple[int, ...] = (2, 4, 6), slice_stride: int | None = None
) -> Architecture:
    return Architecture(
        family="v3",
        backbone=f"medicalnet{depth}",
        dims=3,
        output_stride=8,
        rates=rates,
        image_pooling=True,
        slice_stride=slice_stride,
    )


def without_memory(architecture: Architecture) -> DeepLab:
    with torch.device("meta"):
        return build_network(architecture, bands=1, classes=2).eval().pool_over((96, 96, 96))


@pytest.mark.parametrize(
    ("depth", "millions"), [(10, 14.36), (18, 32.99), (34, 63.31), (50, 46.21)]
)
def test_a_trunk_holds_as_many_numbers_as_the_published_one(depth: int, millions: float) -> None:
    """Another block, width or shortcut: the published weights would not load.

    The table of MedicalNet's README counts batch norm's statistics, and no head.
    """
    trunk = without_memory(volume_network(depth)).backbone
    assert round(sum(part.numel() for part in trunk.state_dict().values()) / 1e6, 2) == millions


def test_the_keys_are_those_of_the_published_files() -> None:
    """Weights would have to be renamed; a shortcut that learns nothing has none there."""
    keys = set(without_memory(volume_network(50)).backbone.state_dict())
    assert keys >= {
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.downsample.0.weight",
        "layer1.0.downsample.1.weight",
        "layer3.5.conv3.weight",
        "layer4.2.bn3.bias",
    }
    shortcuts = [key for key in without_memory(volume_network(18)).state_dict() if "downs" in key]
    assert shortcuts == []


@pytest.mark.parametrize(("depth", "radius"), [(18, 289), (50, 285)])
def test_the_receptive_field_is_that_of_the_layers(depth: int, radius: int) -> None:
    """A dilation or a stride is in another place: the fields were counted by another calculator."""
    found = of_layers(without_memory(volume_network(depth)), "window").receptive_field
    assert found == (2 * radius + 1,) * 3


def test_a_shortcut_that_learns_nothing_picks_places_and_adds_zeros() -> None:
    """Loaded from a file that has none of it, it would hold whatever memory held."""
    trunk = without_memory(volume_network(18)).backbone
    assert isinstance(trunk, MedicalNetTrunk)
    weights = {key: torch.zeros(part.shape) for key, part in trunk.state_dict().items()}
    trunk.to_empty(device="cpu").load_state_dict(weights)
    shortcut = trunk.layer2[0].downsample
    features_BCS = torch.randn(1, 64, 4, 6, 6)
    with torch.inference_mode():
        found_BCS = shortcut(features_BCS)
    assert torch.equal(found_BCS[:, :64], features_BCS[..., ::2, ::2, ::2])
    assert not found_BCS[:, 64:].any()


@pytest.mark.parametrize(("slice_stride", "halo"), [(1, 21), (2, 37), (4, 70), (None, 137)])
def test_thick_slices_are_stepped_over_less(slice_stride: int | None, halo: int) -> None:
    """Slices of 5 mm would be taken for slices of 1 mm: eight of them make 40 mm.

    At steps of 1 the halo is 3 of the stem, 1 of the pool, and 2, 2, 4, 8 and 1 of the layers.
    """
    network = without_memory(volume_network(10, rates=(1,), slice_stride=slice_stride))
    image_BCS = torch.empty(1, 1, 32, 64, 64, device="meta")
    frame = Frame((0, 0, 0), (32, 64, 64))
    coarse_BKS = network.pool_over(None).coarse_logits(image_BCS, frame)
    assert coarse_BKS.shape[2:] == (32 // (slice_stride or 8), 8, 8)
    before = reach_of(network.pool_over((96, 96, 96))).halo.before
    assert before == Halo((halo, 137, 137), (0, 0, 0)).round_up(8).before


def test_a_volume_trunk_takes_a_decoder() -> None:
    """v3+ in three dimensions would lie at the encoder's stride, or could not be tiled."""
    network = without_memory(published("v3plus", "medicalnet10", dims=3))
    image_BCS = torch.empty(1, 1, 64, 64, 64, device="meta")
    coarse_BKS = network.pool_over(None).coarse_logits(image_BCS, Frame((0, 0, 0), (64, 64, 64)))
    assert coarse_BKS.shape == (1, 2, 16, 16, 16)
    chain = stages_of(network)
    assert chain.shapes((64, 64, 64))[chain.logits] == (16, 16, 16)
    assert reach_of(network.pool_over((96, 96, 96))).stride == 8


@pytest.mark.parametrize("slice_stride", [0, 3, 16])
def test_other_slice_strides_are_refused(slice_stride: int) -> None:
    """Features would not lie on whole voxels of the scene."""
    with pytest.raises(BundleError, match="1, 2, 4, 8"):
        volume_network(10, slice_stride=slice_stride)


def test_the_mean_of_the_scene_is_refused_where_slices_have_a_stride_of_their_own() -> None:
    """Its sums are taken over features of one stride on all axes."""
    network = without_memory(volume_network(10, slice_stride=2))
    with pytest.raises(BundleError, match="features every 8 px"):
        of_layers(network, "scene")


def test_tiles_of_thick_slices_equal_the_whole_scan(tmp_path: Path) -> None:
    """Tiles would be cut, padded or interpolated as if features lay 8 slices apart."""
    architecture = volume_network(10, rates=(1,), slice_stride=1)
    torch.manual_seed(4)
    weights = build_network(architecture, bands=1, classes=4).state_dict()
    other = fresh(tmp_path / "slim", dims=3, bands=1)
    bundle = save_bundle(
        tmp_path / "b", replace(other, architecture=architecture, crop=(16, 16, 16)), weights
    )
    network, shape = bundle.network(), (112, 16, 24)
    assert isinstance(network, DeepLab)
    image_CS = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    with torch.inference_mode():
        whole_KS = network(torch.from_numpy(image_CS)[None], Frame((0, 0, 0), shape))[0].numpy()
    reach = reach_of(network)
    predictor = Predictor(
        bundle,
        device="cpu",
        precision=Precision(name="fp32", channels_last=True, why="test"),
        context="window",
        threads=1,
    )
    grid = Grid(shape=shape, tile=(24, 16, 24), stride=8)
    reads = [reach.read(core, shape=shape) for core in grid.cores()]
    assert max(read.shape[0] for read in reads) < shape[0]
    for core, read in zip(grid.cores(), reads, strict=True):
        part_CS = image_CS[(slice(None), *read.slices(within=Region.whole(shape)))]
        found = predictor.logits(part_CS, Frame.of(read, shape=shape), scored=core).numpy()
        wanted = whole_KS[(slice(None), *core.slices(within=Region.whole(shape)))]
        assert np.abs(found - wanted).max() < 1e-4 * whole_KS.std()
