"""``make bench-scene-crf``: one lattice under 1, 4, 16 and 64 tiles, beside a lattice for each."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import yaml
from benchmarks.process_memory import measure
from numpy.typing import NDArray
from rasterio.windows import Window
from scipy.ndimage import zoom

from adapters.ledger_file import LedgerFile

DATA = Path(os.environ.get("TERRAVOX_DATA", "../shared/data"))
GUIDE = "geo/zion_landsat8/landsat_b2345.vrt"
BLOCK = 1000
"""Side of the part of the guide that is mirrored until the scene is filled, in px."""

STEP = 8
"""Of the features that a network's logits would be interpolated from, in px."""

ROWS = 1000
"""That are written at a time: a large scene is never in memory."""

CRF = {
    "iterations": 10,
    "smoothness": {"weight": 3, "position": 3},
    "appearance": {
        "weight": 4, "position": 80, "value": 13, "bands": ["1", "2", "3"], "range": [7000, 16000],
    },
}  # fmt: skip
HALO = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One row of the table."""

    scope: str
    tile: int
    actors: int
    """0: this process alone."""

    budget: str
    """Of memory, as ``--memory-budget`` takes it; empty for none."""


def write_scene(folder: Path, *, side: int, classes: int) -> None:
    """Three bands of Landsat 8, mirrored to fill, and scores as smooth as those of a network."""
    with rasterio.open(DATA / GUIDE) as file:
        block_CYX = file.read((2, 3, 4), window=Window(0, 0, BLOCK, BLOCK))
    coarse_YX = block_CYX[2].reshape(BLOCK // STEP, STEP, BLOCK // STEP, STEP).mean(axis=(1, 3))
    levels = np.quantile(coarse_YX, np.linspace(0, 1, classes + 1)[1:-1])
    truth_YX = np.digitize(coarse_YX, levels)
    rng = np.random.default_rng(0)
    odds_KYX = np.stack([
        zoom(rng.normal(1.5 * (truth_YX == label), 1.0), STEP, order=1) for label in range(classes)
    ])  # fmt: skip
    prob_KYX = np.exp(odds_KYX, dtype=np.float32)
    prob_KYX /= prob_KYX.sum(axis=0)
    write_mirrored(folder / "image.tif", block_CYX, side=side, nodata=0)
    write_mirrored(folder / "scores.tif", prob_KYX, side=side, nodata=None)


def write_mirrored(
    path: Path, block_CYX: NDArray[np.generic], *, side: int, **more: object
) -> None:
    """The block and its mirror images in turns, in tiles on disk."""
    count, period = len(block_CYX), 2 * BLOCK
    index = np.arange(side) % period
    index = np.minimum(index, period - 1 - index)
    profile = {"tiled": True, "blockxsize": 512, "blockysize": 512, "BIGTIFF": "IF_SAFER"} | more
    with rasterio.open(
        path, "w", driver="GTiff", width=side, height=side, count=count, dtype=block_CYX.dtype,
        **profile,
    ) as file:  # fmt: skip
        for top in range(0, side, ROWS):
            rows = index[top : top + ROWS]
            window = Window(0, top, side, len(rows))
            file.write(block_CYX[:, rows][:, :, index], window=window)


def differing(one: Path, other: Path) -> int:
    """Labels of two masks that differ, counted in strips."""
    total = 0
    with rasterio.open(one) as a, rasterio.open(other) as b:
        for top in range(0, a.height, ROWS):
            window = Window(0, top, a.width, min(ROWS, a.height - top))
            total += int((a.read(1, window=window) != b.read(1, window=window)).sum())
    return total


def run(folder: Path, asked: Run) -> tuple[str, Path]:
    """A row of the table but for its last column, and the mask.

    Raises SystemExit where more was taken than the plan said.
    """
    own = {"scope": "scene"} if asked.scope == "scene" else {"halo": HALO}
    crf = folder / f"{asked.scope}.yaml"
    mask = folder / f"{asked.scope}-{asked.tile}-{asked.actors}.tif"
    crf.write_text(yaml.safe_dump(CRF | own))
    backend = ["--workers", str(asked.actors)] if asked.actors else ["--backend", "serial"]
    if asked.budget:
        backend += ["--memory-budget", asked.budget]
    command = [
        str(Path(sys.executable).with_name("terravox")), "refine", str(folder / "image.tif"),
        "--scores", str(folder / "scores.tif"), "-o", str(mask), "--crf", str(crf),
        "--tile", str(asked.tile), "--tracking-uri", "none", *backend,
    ]  # fmt: skip
    measured = measure(command, env=os.environ | {"HOME": str(folder)})
    plan = json.loads(Path(f"{mask}.run", "plan.json").read_text())
    found = json.loads(Path(f"{mask}.run", "manifest.json").read_text())
    lattice, expected = found["crf"]["lattice"], plan["lattice"]
    sent = "".join(f"{x['sent_bytes'] / 2**20 if x else 0:>9.1f}" for x in (lattice, expected))
    ledger = LedgerFile(Path(f"{mask}.run", "ledger"), owner="bench").records().values()
    kept = sum(record.kept for record in ledger) / len(ledger)
    over = measured.peak_bytes > plan["peak_memory_bytes"]
    if over or (lattice and lattice["sent_bytes"] > expected["sent_bytes"]):
        sys.exit(f"{asked} took {measured} and {lattice}, the plan said {plan}")
    row = (
        f"{asked.scope:6}{plan['tiles']:>6}{asked.actors:>7}{measured.seconds:>9.1f}"
        f"{found['seconds']:>9.1f}{max(r.peak_bytes for r in ledger) / 2**20:>9.0f}"
        f"{measured.peak_bytes / 2**20:>9.0f}{plan['peak_memory_bytes'] / 2**20:>9.0f}{sent}"
        f"{kept:>9.0%}"
    )
    return row, mask


def main() -> None:
    """Print a row a run; fail where a label differs from that of the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=1024, help="of the scene, in px")
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--cuts", type=int, nargs="*", default=[1, 2, 4, 8], help="of a side")
    parser.add_argument("--actors", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--scopes", nargs="*", default=["scene", "tile"])
    parser.add_argument("--budget", default="", help="of memory, such as 12GB; none otherwise")
    parser.add_argument("--folder", type=Path, help="of the files; otherwise a temporary one")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="terravox-bench-", dir=asked.folder) as name:
        folder = Path(name)
        write_scene(folder, side=asked.side, classes=asked.classes)
        print(f"{asked.side} px a side, {asked.classes} classes, halo of a tile's own: {HALO} px")
        print(
            f"{'scope':6}{'tiles':>6}{'actors':>7}{'command':>9}{'run s':>9}{'worker':>9}"
            f"{'all MiB':>9}{'planned':>9}{'sent':>9}{'planned':>9}{'kept':>9}{'differ':>9}"
        )
        first, seen = None, []
        for scope in asked.scopes:
            for cut in asked.cuts:
                for actors in (actors for actors in asked.actors if actors <= cut**2):
                    tile = -(-asked.side // cut)
                    this = Run(scope=scope, tile=tile, actors=actors, budget=asked.budget)
                    row, mask = run(folder, this)
                    first = first or mask
                    differ = differing(first, mask)
                    seen += [differ] if scope == "scene" else []
                    print(f"{row}{differ:>9}", flush=True)
    if any(seen):
        sys.exit("a label depends on the tiling")


if __name__ == "__main__":
    main()
