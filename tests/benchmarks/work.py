"""``make bench-work``: multiply-adds of a tile and its halo over those of one pass, counted."""

from __future__ import annotations

from halo_work import all_that_is_read, network_of, tiles_of, work_ratio

BACKBONES = ("slim", "resnet18", "resnet50", "resnet101")
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


def main() -> None:
    """Print one row a case, two figures a network: stage by stage, and tiles that run whole."""
    print("stage by stage / tiles run whole; networks as published, pooling over windows of 512 px")
    print(f"{'':44}" + "".join(f"{name:>16}" for name in BACKBONES))
    for label, scene, side, number in CASES:
        cells = []
        for backbone in BACKBONES:
            network = network_of(backbone, pooled=backbone != "slim")
            tiles = tiles_of(network, scene, side)
            chosen = tiles if number is None else [tiles[number]]
            staged = work_ratio(network, scene, chosen)
            naive = work_ratio(network, scene, chosen, computed=all_that_is_read)
            cells.append(f"{staged:.3f} / {naive:.3f}")
        print(f"{label:44}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
