"""``make bench-seams``: a trained network in three kinds of tiles against one pass, as a picture.

Tiles of 512 px: cut without context, blended by MONAI, and with terravox's exact halo.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from benchmarks.equality import PASSES, Scene, in_tiles, whole_pass
from benchmarks.monai_windows import ROI, blend
from benchmarks.whole_pass import predict
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from adapters.geotiff import GeoTiffSource
from pipeline.domain import Region
from pipeline.inference.normalise import normalise
from pipeline.inference.precision import Precision
from pipeline.models.bundle import load_bundle
from workflows.demo.scene import DEMO_SEED, write_scene
from workflows.demo.show import BUNDLES

SIDE = ROI[0]
PANEL = 512
"""Side of a picture of the scene, in px."""

FLOOR = 1e-6
"""The difference that is drawn black, in deviations; 1 is drawn white."""

FP32 = Precision(name="fp32", channels_last=True, why="asked")


def cut_without_context(scene: Scene) -> Tensor:
    """Logits (K, *S): each tile on its own, as if it were a scene."""
    network = scene.bundle.network().to(memory_format=torch.channels_last)
    image_BCS = torch.from_numpy(scene.image_CS)[None]
    logits_KS = torch.empty(len(scene.bundle.classes), *scene.shape)
    with torch.inference_mode():
        for core in Region.whole(scene.shape).blocks(ROI):
            box = core.slices(within=Region.whole(scene.shape))
            part_BCS = image_BCS[(slice(None), slice(None), *box)]
            part_BCS = part_BCS.contiguous(memory_format=torch.channels_last)
            logits_KS[(slice(None), *box)] = predict(network, part_BCS)[0]
    return logits_KS


def blended(scene: Scene, *, overlap: float) -> Tensor:
    """Logits (K, *S) of MONAI's windows, Gaussian weights."""
    network = scene.bundle.network().to(memory_format=torch.channels_last)
    image_BCS = torch.from_numpy(scene.image_CS)[None]
    image_BCS = image_BCS.contiguous(memory_format=torch.channels_last)
    return blend(network, image_BCS, overlap=overlap, mode="gaussian")[0]


def with_halo(scene: Scene) -> Tensor:
    """Logits (K, *S) of our tiles."""
    logits_KS = torch.empty(len(scene.bundle.classes), *scene.shape)
    for tile, tile_KS in in_tiles(scene, SIDE, precision=FP32):
        box = tile.core.slices(within=Region.whole(scene.shape))
        logits_KS[(slice(None), *box)] = tile_KS
    return logits_KS


def rivals(scene: Scene) -> Iterator[tuple[str, Tensor]]:
    """What is compared with the one pass."""
    yield "tiles without context", cut_without_context(scene)
    yield "MONAI, gaussian, overlap 0.25", blended(scene, overlap=0.25)
    yield "MONAI, gaussian, overlap 0.5", blended(scene, overlap=0.5)
    yield "terravox, exact halo", with_halo(scene)


def largest_in_blocks(map_S: NDArray[np.float32]) -> NDArray[np.float32]:
    """The map as ``PANEL`` x ``PANEL``, each place the largest of its block."""
    step = max(1, map_S.shape[0] // PANEL)
    rows: NDArray[np.float32] = map_S.reshape(PANEL, step, PANEL, step).max(axis=(1, 3))
    return rows


def heat(gap_S: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Differences in deviations as colours (*S, 3): black to red to white, logarithmic."""
    depth_S = 1 - np.log10(np.clip(largest_in_blocks(gap_S), FLOOR, 1)) / np.log10(FLOOR)
    red, green, blue = (np.clip(3 * depth_S - shift, 0, 1) for shift in range(3))
    return (255 * np.stack([red, green, blue], axis=-1)).astype(np.uint8)


def dots(other_S: NDArray[np.bool_], grey_S: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The scene in grey, blocks in which any label differs in red: (*S, 3)."""
    picture_SC = np.repeat(grey_S[..., None], 3, axis=-1)
    picture_SC[largest_in_blocks(other_S.astype(np.float32)) > 0] = (255, 40, 40)
    return picture_SC


def paste(columns: list[tuple[str, list[NDArray[np.uint8]]]]) -> Image.Image:
    """Columns of panels, each under its caption."""
    gap, top = 8, 64
    rows = max(len(panels) for _, panels in columns)
    size = (len(columns) * (PANEL + gap) - gap, top + rows * (PANEL + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (caption, panels) in enumerate(columns):
        x = number * (PANEL + gap)
        draw.text((x + 4, 4), caption, fill="black", font=ImageFont.load_default(size=22))
        for row, panel in enumerate(panels):
            sheet.paste(Image.fromarray(panel), (x, top + row * (PANEL + gap)))
    return sheet


def demo_scene(side: int) -> tuple[Scene, NDArray[np.uint8]]:
    """The demo's network and scene, normalised as a run does; the scene in grey as one panel."""
    bundle = load_bundle(BUNDLES / "fields")
    with tempfile.TemporaryDirectory(prefix="terravox-bench-") as name:
        path = Path(name) / "scene.tif"
        write_scene(path, path.with_name("truth.tif"), size=side, seed=DEMO_SEED)
        block = GeoTiffSource(path).read(Region.whole((side, side)))
    step = side // PANEL
    light_S = block.image_CS[2, ::step, ::step].astype(np.float32)
    low, high = np.percentile(light_S, (2, 98))
    grey_S = (40 + 170 * np.clip((light_S - low) / (high - low), 0, 1)).astype(np.uint8)
    return Scene.of(bundle, normalise(block, bundle.input.scaling)), grey_S


def main() -> None:
    """Print how far each kind of tile is from one pass, and draw where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=2048, help="of the scene, in px")
    parser.add_argument("--out", type=Path, default=Path("bench-out/seams.png"))
    asked = parser.parse_args()
    if asked.side % PANEL:
        parser.error(f"--side {asked.side}: must be a multiple of {PANEL} px")
    scene, grey_S = demo_scene(asked.side)
    whole_KS = whole_pass(scene, PASSES["fp32"][0], dtype=torch.float32)
    deviation, columns = whole_KS.std(), []
    print(f"{asked.side} x {asked.side} px; logits in deviations of those of one pass")
    for label, logits_KS in rivals(scene):
        gap_S = ((logits_KS - whole_KS).abs().amax(dim=0) / deviation).numpy()
        other_S = (logits_KS.argmax(dim=0) != whole_KS.argmax(dim=0)).numpy()
        print(
            f"{label:30} logits off by at most {gap_S.max():.1e}, at more than 1e-3:"
            f" {(gap_S > 1e-3).mean():6.2%}; labels that differ: {other_S.sum()}"
            f" ({other_S.mean():.1e})",
            flush=True,
        )
        caption = f"{label}\n{other_S.sum():,} labels differ from one pass"
        columns.append((caption, [dots(other_S, grey_S), heat(gap_S)]))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    paste(columns).save(asked.out)
    print(f"above: labels that differ, in red; below: logits, black {FLOOR:g} to white 1")
    print(f"picture: {asked.out}")


if __name__ == "__main__":
    main()
