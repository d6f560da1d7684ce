"""``make bench-equality``: tiles of several sizes against one pass of torch over the scene."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scenes import fresh, texture
from torch import Tensor

from adapters.memory import MemorySource
from pipeline.domain import Grid, Halo, Pass, Reach, Region, Tile
from pipeline.inference.padding import read_padded
from pipeline.inference.precision import Precision
from pipeline.inference.predictor import WINDOW, Predictor
from pipeline.inference.stage_plan import coarse_place, coarse_region
from pipeline.inference.staged import StagedNetwork
from pipeline.models.bundle import Bundle
from pipeline.models.frame import Frame
from pipeline.models.geometry import Scale
from pipeline.models.stages import stages_of
from workflows.tracing import traced

FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
SIDES = {2: (256, 512, 1024), 3: (32, 64, 96)}
SHAPES = {2: (1403, 1217), 3: (131, 149, 117)}
"""Of the scene, in pixels or voxels: multiples of nothing."""

NETWORKS = {"slim": 2, "resnet18": 2, "resnet50": 2, "slim-3d": 3}
THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """How the one pass runs; tiles run on ``THREADS`` threads, channels last."""

    label: str
    threads: int
    layout: Literal["channels last", "channels first"]

    tolerance: float | None
    """What was promised, in deviations of all logits of the pass; None for nothing."""


PASSES: dict[Literal["fp32", "bf16"], tuple[Reference, ...]] = {
    "fp32": (
        Reference(label="fp32", threads=THREADS, layout="channels last", tolerance=1e-4),
        Reference(label="fp32, pass otherwise", threads=1, layout="channels first", tolerance=1e-3),
    ),
    "bf16": (Reference(label="bf16", threads=THREADS, layout="channels last", tolerance=None),),
}
IN_DOUBLE = 1e-9
"""Promised of float64, in deviations."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """A scene that is ready for the network, and the network's bundle."""

    bundle: Bundle

    image_CS: NDArray[np.float32]
    """(C, *S) float32, normalised and padded to multiples of the stride."""

    shape: tuple[int, ...]
    """Of the scene before padding."""

    reach: Reach
    """That makes tiles exact."""

    @classmethod
    def of(cls, bundle: Bundle, image_CS: NDArray[np.float32]) -> Scene:
        """Pad a normalised image as a run does."""
        shape, reach = image_CS.shape[1:], traced(bundle, "window").reach
        padded = _grid(shape, reach.stride, reach).padded_shape
        block = read_padded(MemorySource(image_CS), Region.whole(padded))
        return cls(bundle=bundle, image_CS=block.image_CS, shape=shape, reach=reach)

    @property
    def frame(self) -> Frame:
        """Of one pass over all of it."""
        return Frame((0,) * len(self.shape), self.image_CS.shape[1:])

    def tiles(self, side: int) -> Iterator[Tile]:
        """The tiles of a run that the halo makes exact."""
        grid, none = _grid(self.shape, side, self.reach), Halo.uniform(0, ndim=len(self.shape))
        return Pass(case="", name="", grid=grid, reach=self.reach, crf_halo=none).tiles()

    def part(self, tile: Tile) -> NDArray[np.float32]:
        """What a tile reads; a view."""
        box = tile.read.slices(within=Region.whole(self.frame.shape))
        return self.image_CS[(slice(None), *box)]


def _grid(shape: tuple[int, ...], side: int, reach: Reach) -> Grid:
    return Grid(
        shape=shape, tile=(side,) * len(shape), stride=reach.stride, endpoint=reach.endpoint
    )


@dataclass(slots=True, eq=False)
class Difference:
    """How far the logits of tiles are from those of one pass, over all tiles."""

    tolerance: float | None
    """What was promised of the logits, in deviations."""

    deviation: float
    """Of the logits of the pass."""

    greatest: float = 0.0
    """Of any logit, in deviations."""

    labels: int = 0
    """Places whose best class is another one."""

    unexplained: int = 0
    """Of these, places whose two best logits are further apart than twice the tolerance."""

    def add(self, tile_KS: Tensor, whole_KS: Tensor) -> None:
        """Compare logits (K, *S) of the same places."""
        gap_KS = (tile_KS.double() - whole_KS.double()).abs() / self.deviation
        self.greatest = max(self.greatest, float(gap_KS.nan_to_num(nan=math.inf).max()))
        other_S = tile_KS.argmax(dim=0) != whole_KS.argmax(dim=0)
        self.labels += int(other_S.sum())
        if self.tolerance is not None:
            best_KS = whole_KS.double().topk(2, dim=0).values
            apart_S = (best_KS[0] - best_KS[1]) / self.deviation > 2 * self.tolerance
            self.unexplained += int((other_S & apart_S).sum())

    @property
    def fine(self) -> bool:
        """Whether it is within what was promised."""
        return self.tolerance is None or (self.greatest <= self.tolerance and not self.unexplained)

    def __str__(self) -> str:
        unexplained = "-" if self.tolerance is None else str(self.unexplained)
        more = "" if self.fine else "  more than promised"
        return f"{self.greatest:10.1e} {self.labels:8} {unexplained:>12}{more}"


def whole_pass(scene: Scene, how: Reference, *, dtype: torch.dtype) -> Tensor:
    """One pass of the plain module: (K, *S) float32 logits of the scene."""
    last = how.layout == "channels last"
    layout = FORMATS[len(scene.shape)] if last else torch.contiguous_format
    network = scene.bundle.network().to(dtype=dtype, memory_format=layout)
    image_BCS = torch.from_numpy(scene.image_CS)[None].to(dtype).contiguous(memory_format=layout)
    torch.set_num_threads(how.threads)
    with torch.inference_mode():
        coarse_BKS = network.coarse_logits(image_BCS, scene.frame)
        logits_KS = network.upsample(coarse_BKS.float().contiguous())[0]
    return logits_KS[(slice(None), *(slice(side) for side in scene.shape))]


def in_tiles(scene: Scene, side: int, *, precision: Precision) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile with its logits (K, *S), as a worker computes them."""
    predictor = Predictor(
        scene.bundle, device="cpu", precision=precision, context="window", threads=THREADS
    )
    for tile in scene.tiles(side):
        frame = Frame.of(tile.read, shape=scene.frame.shape)
        yield tile, predictor.logits(scene.part(tile), frame, scored=tile.core)


def in_double_tiles(scene: Scene, side: int) -> float:
    """Greatest difference of a coarse logit in float64, in deviations.

    Upsampling, whose weights are positive and sum to 1, cannot make it greater.
    """
    layout = FORMATS[len(scene.shape)]
    network = scene.bundle.network().to(dtype=torch.float64, memory_format=layout)
    upsample = Scale.of(network.upsample)
    staged = StagedNetwork(stages_of(network), window=WINDOW)
    torch.set_num_threads(THREADS)
    greatest = 0.0
    with torch.inference_mode():
        image_BCS = torch.from_numpy(scene.image_CS)[None].double().contiguous(memory_format=layout)
        whole_BKS = network.coarse_logits(image_BCS, scene.frame)
        for tile in scene.tiles(side):
            coarse = coarse_region(tile.read, scored=tile.scored, upsample=upsample)
            part_BCS = torch.from_numpy(scene.part(tile))[None].double()
            frame = Frame.of(tile.read, shape=scene.frame.shape)
            tile_BKS = staged.coarse_logits(part_BCS, frame, coarse)
            place = coarse.move(coarse_place(frame.origin, upsample=upsample))
            box = place.slices(within=Region.whole(tuple(whole_BKS.shape[2:])))
            whole = whole_BKS[(slice(None), slice(None), *box)]
            greatest = max(greatest, float((tile_BKS - whole).abs().max()))
    return greatest / float(whole_BKS.std())


def compare(name: str, scene: Scene) -> bool:
    """Print the rows of one network; whether all of them are within what was promised."""
    good = True
    largest = max(-(-side // 64) * 64 for side in scene.shape)
    sides = [*(side for side in SIDES[len(scene.shape)] if side < largest), largest]
    for floats, passes in PASSES.items():
        precision = Precision(name=floats, channels_last=True, why="asked")
        wholes = [whole_pass(scene, one, dtype=precision.dtype) for one in passes]
        for side in sides:
            found = [Difference(one.tolerance, float(each.std())) for one, each in
                     zip(passes, wholes, strict=True)]  # fmt: skip
            for tile, tile_KS in in_tiles(scene, side, precision=precision):
                box = tile.core.slices(within=Region.whole(scene.shape))
                for each, whole_KS in zip(found, wholes, strict=True):
                    each.add(tile_KS, whole_KS[(slice(None), *box)])
            for one, each in zip(passes, found, strict=True):
                good &= each.fine
                size = "whole" if side == largest else str(side)
                print(f"{name:9} {one.label:21} {size:>6} {each}", flush=True)
    for side in (sides[0], largest):
        worst = in_double_tiles(scene, side)
        good &= worst <= IN_DOUBLE
        size = "whole" if side == largest else str(side)
        print(f"{name:9} {'float64':21} {size:>6} {worst:10.1e}", flush=True)
    return good


def scene_of(name: str, folder: Path, *, scale: float) -> Scene:
    """An untrained network of four bands, and texture of deviation 1."""
    dims = NETWORKS[name]
    bundle = fresh(folder / name, backbone=name.removesuffix("-3d"), dims=dims, bands=4, classes=6)
    shape = tuple(round(side * scale) | 1 for side in SHAPES[dims])
    image_CS = np.stack([texture(shape, seed=seed) for seed in range(4)]).astype(np.float32)
    axes = tuple(range(1, dims + 1))
    image_CS -= image_CS.mean(axis=axes, keepdims=True)
    return Scene.of(bundle, image_CS / image_CS.std(axis=axes, keepdims=True))


def main() -> None:
    """Print what differs; fail where it is more than was promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", action="append", choices=list(NETWORKS), help="all if absent")
    parser.add_argument("--scale", type=float, default=1.0, help="of the scenes' sides")
    asked = parser.parse_args()
    good = True
    print(f"tiles: {THREADS} threads, channels last; otherwise: 1 thread, channels first")
    print(f"{'network':9} {'':21} {'tile':>6} {'max logit':>10} {'labels':>8} {'unexplained':>12}")
    with tempfile.TemporaryDirectory(prefix="terravox-bench-") as name:
        for network in asked.network or NETWORKS:
            scene = scene_of(network, Path(name), scale=asked.scale)
            print(f"{network}: scene of {' x '.join(map(str, scene.shape))}", flush=True)
            good &= compare(network, scene)
    sys.exit(not good)


if __name__ == "__main__":
    main()
