"""Slices that lie further apart than pixels: strides and dilations along z of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scenes import fresh
from torch import nn

from pipeline.domain import Grid, Halo, Pass, Region
from pipeline.errors import BundleError
from pipeline.inference.stage_plan import coarse_place, coarse_region
from pipeline.inference.staged import StagedNetwork
from pipeline.models.architecture import Architecture
from pipeline.models.bundle import load_bundle
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.frame import Frame
from pipeline.models.fresh import spread
from pipeline.models.nan_probe import probe_halves, probe_network, touched
from pipeline.models.published import published
from pipeline.models.receptive_field import local_halo, reach_of
from pipeline.models.stages import stages_of


def volumes(family: str, backbone: str, **changes: object) -> Architecture:
    return replace(published(family, backbone, dims=3), **changes)  # type: ignore[arg-type]


CROP = (16, 24, 24)
"""The window of image pooling, in voxels: smaller than the scenes."""

NETWORKS = {
    "slim, 2.5 mm": volumes("v3", "slim", slice_ratio=2.5),
    "slim, pooled, 5 mm, steps of one slice": volumes(
        "v3", "slim", slice_stride=1, slice_ratio=5.0, image_pooling=True
    ),
    "slim, decoder": volumes("v3plus", "slim", slice_stride=1, slice_ratio=3.0),
    "medicalnet, 5 mm": volumes("v3", "medicalnet10", rates=(1,), slice_stride=1, slice_ratio=5.0),
    "medicalnet, decoder": volumes(
        "v3plus", "medicalnet10", rates=(1,), slice_stride=2, slice_ratio=4.0
    ),
}


def network_of(architecture: Architecture) -> DeepLab:
    torch.manual_seed(6)
    network = build_network(architecture, bands=1, classes=3)
    if architecture.backbone == "slim":
        spread(network)
    return network.pool_over(CROP).double().eval()


@pytest.mark.parametrize(
    ("backbone", "stride", "ratio", "along_z"),
    [
        # As published, whatever the stride: weights that were trained so keep their meaning.
        ("medicalnet18", None, None, {1: 1, 2: 2, 4: 4, 6: 6}),
        # Features 40 mm apart along z and 8 mm elsewhere, then 10 mm, then 5 mm.
        ("medicalnet18", None, 5.0, {1: 1, 2: 1, 4: 1, 6: 1}),
        ("medicalnet18", 2, 5.0, {1: 1, 2: 2, 4: 3, 6: 5}),
        ("medicalnet18", 1, 5.0, {1: 2, 2: 3, 4: 6, 6: 10}),
        ("slim", None, 2.5, {1: 1, 2: 1, 4: 2, 6: 2}),
        ("slim", 1, 0.5, {1: 4, 2: 8, 4: 16, 6: 24}),
    ],
)
def test_dilations_along_z_reach_as_far_in_mm(
    backbone: str, stride: int | None, ratio: float | None, along_z: dict[int, int]
) -> None:
    """Slices 5 mm thick would be taken for slices of 1 mm."""
    asked = volumes("v3", backbone, slice_stride=stride, slice_ratio=ratio)
    for rate, z in along_z.items():
        assert asked.dilation(rate) == (z, rate, rate)


@pytest.mark.parametrize("backbone", ["slim", "medicalnet10", "medicalnet50"])
def test_every_dilated_layer_of_trunk_and_pyramid_follows(backbone: str) -> None:
    """One layer with the dilation of the other axes would see slices further off than pixels."""
    asked = volumes("v3", backbone, slice_ratio=100.0)
    with torch.device("meta"):
        network = build_network(asked, bands=1, classes=2)
    layers = [part for part in network.modules() if isinstance(part, nn.Conv3d)]
    rates = {layer.dilation[1] for layer in layers}
    assert rates >= set(asked.rates) | {2}
    assert {layer.dilation[0] for layer in layers} == {1}
    assert all(
        layer.padding[0] == layer.kernel_size[0] // 2 and layer.dilation[1] == layer.dilation[2]
        for layer in layers
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_tiles_of_thick_slices_agree_with_one_pass(name: str) -> None:
    """A tile would read as many slices as columns, too few or in the wrong place."""
    network = network_of(NETWORKS[name])
    reach, chain = reach_of(network), stages_of(network)
    stride = reach.stride
    shape = (reach.halo_with_window.before[0] + 4 * stride + 3, 2 * stride, 3 * stride)
    grid = Grid(shape=shape, tile=(2 * stride, *shape[1:]), stride=stride)
    sweep = Pass(case="", name="", grid=grid, reach=reach, crf_halo=Halo.uniform(0, ndim=3))
    padded = grid.padded_shape
    generator = torch.Generator().manual_seed(3)
    scene_BCS = torch.randn(1, 1, *padded, generator=generator, dtype=torch.float64)
    whole = Region.whole(padded)
    with torch.inference_mode():
        whole_BKS = network(scene_BCS, Frame((0, 0, 0), padded))
        for tile in (sweep.tile(0), sweep.tile(grid.counts[0] - 1)):
            assert tile.read != whole
            frame = Frame.of(tile.read, shape=padded)
            coarse = coarse_region(tile.read, scored=tile.core, upsample=chain.upsample)
            part_BCS = scene_BCS[(..., *tile.read.slices(within=whole))]
            coarse_BKS = StagedNetwork(chain, window=8).coarse_logits(part_BCS, frame, coarse)
            at = coarse.move(coarse_place(frame.origin, upsample=chain.upsample))
            fine_BKS = chain.upsample.layer(coarse_BKS.contiguous())
            found_BKS = fine_BKS[(..., *tile.core.slices(within=chain.upsample.gives(at)))]
            want_BKS = whole_BKS[(..., *tile.core.slices(within=whole))]
            assert (found_BKS - want_BKS).abs().max() <= 1e-9 * whole_BKS.std()


@pytest.mark.parametrize("name", ["slim, 2.5 mm", "slim, decoder"])
def test_a_nan_reaches_no_further_than_the_arithmetic_says(name: str) -> None:
    """The halo along z would be that of another axis."""
    network = network_of(NETWORKS[name])
    interval = local_halo(stages_of(network))
    most_px = 2 * interval.largest + 16 * network.stride
    found = probe_network(network, most_px=most_px, by=probe_halves).halo
    assert found is not None
    assert found | reach_of(network).halo == reach_of(network).halo
    assert found.before[0] < found.before[1]


def test_a_nan_crosses_as_many_slices_of_a_deep_trunk_as_the_arithmetic_says() -> None:
    """MedicalNet's trunk would see further along z than its tiles read."""
    asked = volumes(
        "v3", "medicalnet10", rates=(1,), image_pooling=False, slice_stride=1, slice_ratio=5.0
    )
    network = network_of(asked).float()
    halo = reach_of(network).halo
    length = 2 * halo.largest
    frame = Frame((0, 0, 0), (length, 16, 16))
    image_BCS = torch.linspace(1, 2, length * 256).reshape(1, 1, length, 16, 16)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        hit = touched(lambda x: network(x, frame), image_BCS, axis=0, place=slice(None, 80))
    assert 0 < hit.stop - 80 <= halo.before[0] < halo.before[1]


def test_a_bundle_says_how_far_its_slices_lie_apart(tmp_path: Path) -> None:
    """What was trained for thick slices would come back as a network for thin ones."""
    saved = fresh(tmp_path / "thick", dims=3, bands=1, slice_ratio=5.0)
    assert "slice_ratio: 5.0" in (tmp_path / "thick" / "model.yaml").read_text()
    network = load_bundle(tmp_path / "thick").network()
    assert isinstance(network, DeepLab)
    before = reach_of(network).halo.before
    assert before[0] < before[1]
    other = fresh(tmp_path / "thin", dims=3, bands=1)
    assert "slice" not in (tmp_path / "thin" / "model.yaml").read_text()
    assert saved.digest != other.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slice_ratio": 0.0}, "between 0.01 and 100"),
        ({"slice_ratio": float("nan")}, "between 0.01 and 100"),
        ({"slice_stride": 4}, "there is: 1, 2"),
        ({"dims": 2, "output_stride": 4, "slice_ratio": 5.0}, "volumes have slices"),
    ],
)
def test_slices_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    """A network would be built with dilations of its own invention."""
    with pytest.raises(BundleError, match=message):
        volumes("v3", "slim", **changes)
