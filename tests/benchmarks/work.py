"""``make bench-work``: multiply-adds of a tile and its halo over those of one pass, counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from pipeline.domain import Grid, Halo, Pass, Region, Tile
from pipeline.inference.stage_plan import needs_of, stage_work
from pipeline.models.architecture import Architecture
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.receptive_field import reach_of
from pipeline.models.stages import stages_of

NETWORKS = {
    name: Architecture(
        family="v3", backbone=name, dims=2, output_stride=8, rates=(12, 24, 36), image_pooling=True
    )
    for name in ("resnet18", "resnet50", "resnet101")
} | {
    "slim": Architecture(
        family="v3", backbone="slim", dims=2, output_stride=4, rates=(2, 4, 6), image_pooling=False
    )
}
"""As published, and the slim one as ``model new`` makes it."""

CROP = (512, 512)
"""The window of image pooling, in px."""

MIDDLE = 12
"""Of five by five tiles."""

CASES = (
    ("a tile that is the scene, 4096 px", 4096, 4096, None),
    ("an 8192 px scene in four tiles of 4096 px", 8192, 4096, None),
    ("an interior tile of 8192 px", 5 * 8192, 8192, MIDDLE),
    ("an interior tile of 4096 px", 5 * 4096, 4096, MIDDLE),
    ("an interior tile of 512 px", 5 * 512, 512, MIDDLE),
)
"""What is counted: side of the scene, side of the tiles, and which tile; None for all."""


def work_ratio(network: DeepLab, scene: int, tiles: Iterable[Tile]) -> float:
    """Work of the tiles over that of one pass, by the share of the scene that they are."""
    chain = stages_of(network)
    shape = (scene,) * network.architecture.dims
    whole, work, scored = Region.whole(shape), 0, 0
    for tile in tiles:
        needs = needs_of(chain, tile.read, scored=tile.scored, shape=shape)
        work, scored = work + stage_work(chain, needs), scored + tile.core.size
    one = stage_work(chain, needs_of(chain, whole, scored=whole, shape=shape))
    return work / one * whole.size / scored


def main() -> None:
    """Print one row a case, two figures a network: stage by stage, and tiles that run whole."""
    print("stage by stage / tiles run whole; with the exact halo; image pooling over 512 px")
    print(f"{'':44}" + "".join(f"{name:>16}" for name in NETWORKS))
    for label, scene, side, number in CASES:
        cells = []
        for architecture in NETWORKS.values():
            with torch.device("meta"):
                network = build_network(architecture, bands=3, classes=6).eval().pool_over(CROP)
            grid = Grid(shape=(scene, scene), tile=(side, side), stride=architecture.output_stride)
            none = Halo.uniform(0, ndim=2)
            sweep = Pass(case="", name="", grid=grid, reach=reach_of(network), crf_halo=none)
            tiles = list(sweep.tiles()) if number is None else [sweep.tile(number)]
            staged = work_ratio(network, scene, tiles)
            # A tile that runs whole computes every layer over all that it reads.
            naive = work_ratio(network, scene, [replace(tile, scored=tile.read) for tile in tiles])
            cells.append(f"{staged:.3f} / {naive:.3f}")
        print(f"{label:44}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
