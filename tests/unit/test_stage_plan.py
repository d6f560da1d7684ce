from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.domain import Grid, Halo, Pass, Region, Tile
from pipeline.errors import BundleError
from pipeline.inference.stage_plan import needs_of, row_block, stage_work
from pipeline.inference.staged import without_idle_taps
from pipeline.models.architecture import Architecture
from pipeline.models.chain import Convolution
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.frame import Frame
from pipeline.models.geometry import Slide
from pipeline.models.receptive_field import reach_of
from pipeline.models.stages import stages_of


def network_of(backbone: str, *, dims: int = 2, pooled: bool = False) -> DeepLab:
    """As published: stride 8 and rates 12, 24, 36 of the ResNets; weights not filled."""
    slim = backbone == "slim"
    architecture = Architecture(
        family="v3",
        backbone=backbone,
        dims=dims,
        output_stride=(4 if dims == 2 else 2) if slim else 8,
        rates=(2, 4, 6) if slim else (12, 24, 36),
        image_pooling=pooled,
    )
    with torch.device("meta"):
        network = build_network(architecture, bands=3, classes=6).eval()
    return network.pool_over((512,) * dims)


def tiles_of(network: DeepLab, scene: int, side: int) -> list[Tile]:
    grid = Grid(shape=(scene, scene), tile=(side, side), stride=network.architecture.output_stride)
    halo = Halo.uniform(0, ndim=2)
    sweep = Pass(case="", name="", grid=grid, reach=reach_of(network), crf_halo=halo)
    return list(sweep.tiles())


def work_ratio(
    network: DeepLab, scene: int, tiles: list[Tile], *, canonical_px: int | None = None
) -> float:
    """Work of the tiles over that of one pass, by the share of the scene that they are."""
    chain, shape = stages_of(network), (scene, scene)
    whole = Region.whole(shape)
    one = stage_work(chain, needs_of(chain, whole, scored=whole, shape=shape))
    needs = (
        needs_of(chain, tile.read, scored=tile.scored, shape=shape, canonical_px=canonical_px)
        for tile in tiles
    )
    works = (stage_work(chain, each) for each in needs)
    return sum(works) / one * whole.size / sum(tile.core.size for tile in tiles)


@pytest.mark.parametrize(
    ("backbone", "dims", "pooled"),
    [
        ("resnet101", 2, False),
        ("resnet50", 2, True),
        ("resnet18", 2, False),
        ("slim", 2, True),
        ("slim", 3, False),
    ],
)
def test_the_work_of_a_scene_is_what_torch_counts_for_one_pass(
    backbone: str, dims: int, pooled: bool
) -> None:
    """A layer would be left out of the cost, or counted at another place's size."""
    network, shape = network_of(backbone, dims=dims, pooled=pooled), (96, 64, 48)[:dims]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network.coarse_logits(torch.empty(1, 3, *shape), Frame((0,) * dims, shape))
    chain, whole = stages_of(network), Region.whole(shape)
    work = stage_work(chain, needs_of(chain, whole, scored=whole, shape=shape))
    assert 2 * work == counter.get_total_flops()


def test_a_tile_that_is_the_scene_does_the_work_of_one_pass() -> None:
    """Windows would pay for their halos again and again."""
    network = network_of("resnet50", pooled=True)
    assert work_ratio(network, 4096, tiles_of(network, 4096, 4096)) == 1.0


@pytest.mark.parametrize(
    ("backbone", "scene", "side", "number", "limit"),
    [
        pytest.param("resnet50", 8192, 4096, None, 1.20, id="resnet50, 8192 in four 4096"),
        pytest.param("resnet50", 5 * 4096, 4096, 12, 1.35, id="resnet50, interior 4096"),
        pytest.param("resnet50", 5 * 8192, 8192, 12, 1.20, id="resnet50, interior 8192"),
        pytest.param("resnet101", 5 * 4096, 4096, 12, 1.50, id="resnet101, interior 4096"),
        pytest.param("resnet101", 5 * 8192, 8192, 12, 1.30, id="resnet101, interior 8192"),
    ],
)
@pytest.mark.parametrize("pooled", [False, True])
def test_halo_work_of_a_deep_network_is_a_small_share(
    backbone: str, scene: int, side: int, number: int | None, limit: float, *, pooled: bool
) -> None:
    """Every layer would be computed over the halo of all layers, as one pass over a tile does."""
    network = network_of(backbone, pooled=pooled)
    tiles = tiles_of(network, scene, side)
    if number is not None:
        tiles = [tiles[number]]
    ratio = work_ratio(network, scene, tiles)
    share = sum(tile.core.size for tile in tiles)
    naive = sum(tile.read.size for tile in tiles) / share
    assert 1.0 < ratio <= limit
    assert ratio < 1 + 0.5 * (naive - 1)


@pytest.mark.parametrize("pooled", [False, True])
def test_canonical_windows_cost_a_known_share_more(*, pooled: bool) -> None:
    """Each layer's windows would be grown by those of the layers after it: 3 times the work."""
    network = network_of("resnet50", pooled=pooled)
    scene = 5 * 4096
    interior = tiles_of(network, scene, 4096)[12:13]
    rows = work_ratio(network, scene, interior)
    canonical = work_ratio(network, scene, interior, canonical_px=256)
    assert rows < 1.26 < 1.44 < canonical < 1.46
    whole = tiles_of(network, 4096, 4096)
    assert work_ratio(network, 4096, whole, canonical_px=256) == 1.0


MEASURE = """
import sys, torch
from pipeline.domain import Region
from pipeline.inference.canonical import CanonicalNetwork
from pipeline.inference.map_layout import StageBytes
from pipeline.inference.stage_plan import needs_of
from pipeline.inference.staged import StagedNetwork
from pipeline.models.architecture import Architecture
from pipeline.models.deeplab import build_network
from pipeline.models.frame import Frame
from pipeline.models.stages import stages_of

def held(key):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.set_num_threads(1)
SIZE = (512, 8192)  # rows are what is held
slim = Architecture(
    family="v3", backbone="slim", dims=2, output_stride=4, rates=(2, 4, 6), image_pooling=True
)
network = build_network(slim, bands=3, classes=6).eval().pool_over((256, 256))
chain, shape = stages_of(network), SIZE
whole = Region.whole(shape)
side = int(sys.argv[1]) or None
needs = needs_of(chain, whole, scored=whole, shape=shape, canonical_px=side)
staged = CanonicalNetwork(chain, side_px=side) if side else StagedNetwork(chain, window=64)
def empty(*size):
    return torch.zeros(1, 3, 1, 1).expand(1, 3, *size)  # of which no more is held

with torch.inference_mode():
    staged.coarse_logits(empty(256, 256), Frame((0, 0), (256, 256)), Region((0, 0), (64, 64)))
    before = held("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    staged.coarse_logits(empty(*SIZE), Frame((0, 0), shape), needs.regions[chain.logits])
counted = StageBytes.of(chain, needs, window=64, itemsize=4, hosted=False)
print((held("VmHWM") - before) / sum(counted))
"""


@pytest.mark.parametrize("canonical_px", [0, 256], ids=["rows", "canonical"])
def test_a_tile_takes_the_memory_that_was_predicted(canonical_px: int) -> None:
    """A plan would be refused that fits, or a worker killed that was told it fits.

    The least of three processes: what else one of them holds, a tenth of so small a tile at times,
    only adds.
    """
    command = [sys.executable, "-c", MEASURE, str(canonical_px)]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(3)]
    assert 0.6 < min(float(run.stdout) for run in runs) < 1.05


def test_runs_of_rows_cover_a_map_in_order() -> None:
    """A map that takes another's memory would overwrite places that are still to be read."""
    region = Region((3, 5, 7), (12, 10, 11))
    blocks = list(region.blocks(row_block(region.shape, 45)))
    assert sum(block.size for block in blocks) == region.size
    places = [block.start for block in blocks]
    assert places == sorted(places)
    assert all(block.shape[1:] == (5, 4) for block in blocks)


def test_taps_that_meet_only_padding_are_left_out() -> None:
    """At the scene's border a wide dilation would multiply zeros, and copy them in."""
    slide = Slide(kernel=(3, 3), stride=(1, 1), padding=(6, 6), dilation=(6, 6))
    layer = Convolution(slide=slide, weight=torch.randn(4, 2, 3, 3), bias=None, groups=1)
    top = without_idle_taps(layer, Region((0, 0), (6, 40)), (30, 40))
    assert (top.slide.kernel, top.slide.padding) == ((2, 3), (0, 6))
    assert torch.equal(top.weight, layer.weight[:, :, 1:])
    bottom = without_idle_taps(layer, Region((24, 0), (30, 40)), (30, 40))
    assert (bottom.slide.kernel, bottom.slide.padding) == ((2, 3), (6, 6))
    assert without_idle_taps(layer, Region((5, 0), (7, 40)), (30, 40)) is layer


def test_a_layer_that_cannot_run_in_windows_is_named() -> None:
    """A network someone brings would run in windows, and its output depend on them."""
    network = network_of("slim")
    network.classifier[1] = nn.Sequential(nn.AdaptiveAvgPool2d(1), network.classifier[1])
    with pytest.raises(BundleError, match=r"AdaptiveAvgPool2d.* mixes the whole scene"):
        stages_of(network)
