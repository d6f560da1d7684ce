"""``make bench-reads``: how often is a block of the source decoded, over once?

Two readers take the tiles of a scene as two actors do; a block is decoded each time that its bytes
are taken from the file, which the kernel counts. No network runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import rasterio

from adapters.geotiff import CACHE_BYTES, GeoTiffSource
from pipeline.domain import Grid, Halo, Pass, Reach, Region, Tile, Walk
from pipeline.execution.feed import FairFeed
from pipeline.inference.padding import read_padded
from pipeline.ports import Job

SIDE, BLOCK = 24576, 512
CASES = {"slim": (2048, 64), "ResNet-50": (4096, 520)}
"""Tile and halo, in pixels."""

PIXEL_BYTES = 8
"""Of four bands of 16 bits: here there is one of 8, and caches are smaller by as much."""


def write_noise(path: Path) -> None:
    """Bytes that do not compress: every block takes as much of the file."""
    rng = np.random.default_rng(0)
    with rasterio.open(
        path, "w", driver="GTiff", width=SIDE, height=SIDE, count=1, dtype="uint8", tiled=True,
        blockxsize=BLOCK, blockysize=BLOCK, compress="deflate", zlevel=1, num_threads=2,
    ) as file:  # fmt: skip
        for top in range(0, SIDE, BLOCK):
            strip = rng.integers(0, 256, (BLOCK, SIDE), dtype=np.uint8)
            file.write(strip, 1, window=((top, top + BLOCK), (0, SIDE)))


def read_all(source: GeoTiffSource, regions: Sequence[Region]) -> int:
    """Read regions one after another; bytes taken from the file."""
    source.info  # noqa: B018  the header does not count
    before = _taken()
    for region in regions:
        read_padded(source, region)
    return _taken() - before


def _taken() -> int:
    """Bytes that this process has read so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def shares(stretches: Iterable[list[Tile]]) -> list[list[Region]]:
    """What each of two actors of equal speed reads, in order."""
    feed = FairFeed()
    feed.add([Job(work=None, tile=tile) for tile in tiles] for tiles in stretches)  # type: ignore[arg-type]
    feed.close()
    regions: list[list[Region]] = [[], []]
    while not feed.ended:
        for worker in (0, 1):
            if job := feed.take(worker):
                regions[worker].append(job.tile.read)
    return regions


def amplification(scene: Path, source: GeoTiffSource, stretches: Iterable[list[Tile]]) -> float:
    """Bytes that two actors take from the file, over its size."""
    with ProcessPoolExecutor(2, get_context("spawn")) as readers:
        taken = sum(readers.map(read_all, [source] * 2, shares(stretches)))
    return taken / scene.stat().st_size


def main() -> None:
    """Print the amplification of each reach, row by row as one would, and in bands as it is run."""
    with tempfile.TemporaryDirectory(prefix="terravox-bench-") as name:
        scene = Path(name) / "scene.tif"
        write_noise(scene)
        for label, (tile, halo) in CASES.items():
            sweep = Pass(
                case="scene",
                name="segment",
                grid=Grid(shape=(SIDE, SIDE), tile=(tile, tile), stride=8),
                reach=Reach(stride=8, halo=Halo.uniform(halo, ndim=2)),
                crf_halo=Halo.uniform(0, ndim=2),
            )
            plain = GeoTiffSource(scene, CACHE_BYTES // PIXEL_BYTES)
            rows = amplification(scene, plain, ([tile] for tile in sweep.tiles()))
            held = Walk(sweep).remembered_pixels
            bands = amplification(scene, GeoTiffSource(scene, held), Walk(sweep).stretches())
            print(
                f"{label}, {tile} px tiles, halo {halo} px: blocks decoded {bands:.2f} times with"
                f" {held * PIXEL_BYTES >> 20} MiB remembered; row by row {rows:.2f} times with"
                f" {CACHE_BYTES >> 20} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
