"""Networks as they are published, and the work of their tiles over that of one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pipeline.domain import Grid, Halo, Pass, Region, Tile
from pipeline.inference.stage_plan import needs_of, stage_work
from pipeline.models.architecture import Architecture
from pipeline.models.deeplab import DeepLab, build_network
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
    """All tiles of ``side`` px of a square scene, with their exact halo."""
    grid = Grid(shape=(scene, scene), tile=(side, side), stride=network.architecture.output_stride)
    halo = Halo.uniform(0, ndim=2)
    sweep = Pass(case="", name="", grid=grid, reach=reach_of(network), crf_halo=halo)
    return list(sweep.tiles())


def scored_part(tile: Tile) -> Region:
    """What a tile that runs stage by stage computes of its last layer."""
    return tile.scored


def all_that_is_read(tile: Tile) -> Region:
    """What a tile that runs whole computes of every layer."""
    return tile.read


def work_ratio(
    network: DeepLab,
    scene: int,
    tiles: Sequence[Tile],
    *,
    computed: Callable[[Tile], Region] = scored_part,
) -> float:
    """Work of the tiles over that of one pass, by the share of the scene that they are."""
    chain, shape = stages_of(network), (scene, scene)
    whole = Region.whole(shape)
    one = stage_work(chain, needs_of(chain, whole, scored=whole, shape=shape))
    works = (
        stage_work(chain, needs_of(chain, tile.read, scored=computed(tile), shape=shape))
        for tile in tiles
    )
    return sum(works) / one * whole.size / sum(tile.core.size for tile in tiles)
