"""``make bench-networks``: every published network in one row, as a Markdown table.

Receptive field, halo and work are counted; equality and speed are measured, fp32. Tiles are
compared with one pass over two strips, one along each axis, that are longer than the halo.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from benchmarks.equality import PASSES, THREADS, Difference, Scene, in_tiles, whole_pass
from benchmarks.work import CROP, work_ratio
from numpy.typing import NDArray
from scenes import texture

from pipeline.domain import Grid, Halo, Pass, Region
from pipeline.inference.precision import Precision
from pipeline.inference.predictor import Predictor
from pipeline.models.architecture import Architecture
from pipeline.models.baselines import baseline
from pipeline.models.bundle import Bundle, CustomArchitecture
from pipeline.models.custom_network import CustomNetwork, network_of_entry_point
from pipeline.models.custom_reach import probe_custom
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.fresh import new_bundle
from pipeline.models.published import published
from pipeline.models.receptive_field import reach_of, receptive_field
from pipeline.models.stages import stages_of

NETWORKS: Mapping[str, Architecture | CustomArchitecture] = MappingProxyType(
    {
        "v1 LargeFOV, VGG-16": published("v1", "vgg16"),
        "v1 MSc, VGG-16": replace(published("v1", "vgg16"), multi_scale="features"),
        "v2 ASPP-L, VGG-16": published("v2", "vgg16"),
        "v2 ASPP, ResNet-101": published("v2", "resnet101"),
        "v2 MSC, ResNet-101": replace(published("v2", "resnet101"), multi_scale="inputs"),
        "v3 torchvision, ResNet-50": published("v3", "resnet50"),
        "v3 torchvision, ResNet-101": published("v3", "resnet101"),
        "v3 MG(1,2,4), ResNet-50": published("v3", "resnet50-tf", output_stride=16),
        "v3 MG(1,2,4), ResNet-101": published("v3", "resnet101-tf", output_stride=16),
        "v3 cascade, ResNet-50": replace(
            published("v3", "resnet50-tf", output_stride=16),
            rates=(),
            image_pooling=False,
            cascade=3,
        ),
        "v3 Xception-65": published("v3", "xception65", output_stride=16),
        "v3+ ResNet-101": published("v3plus", "resnet101-tf", output_stride=16),
        "v3+ Xception-65": published("v3plus", "xception65", output_stride=16),
        "v3+ Xception-71": published("v3plus", "xception71", output_stride=16),
        "FCN, ResNet-50": published("fcn", "resnet50"),
        "FCN, ResNet-101": published("fcn", "resnet101"),
        "SegNet": baseline("segnet", "vgg16", dims=2, bands=3, classes=21),
        "slim": published("v3", "slim"),
        "slim, 3-D": published("v3", "slim", dims=3),
        "v3 MedicalNet-18, 3-D": published("v3", "medicalnet18", dims=3),
        "v3 MedicalNet-50, 3-D": published("v3", "medicalnet50", dims=3),
        "v3 MedicalNet-18, slices of 5 mm": replace(
            published("v3", "medicalnet18", dims=3), slice_stride=2, slice_ratio=5.0
        ),
    }
)
"""As published: v3 and v3+ at the stride they were trained at, torchvision's at its own."""

CROPS = MappingProxyType({2: CROP, 3: (96, 96, 96)})
"""The window of image pooling, in px, by number of axes."""

TILES = MappingProxyType({2: (8192, 4096), 3: (384, 192)})
"""Sides of the interior tiles whose work is counted, in px, by number of axes."""

STRIP_TILE = MappingProxyType({2: 256, 3: 32})
"""Side of the tiles that are compared, in px, up to a multiple of the stride."""

TIMED = MappingProxyType({2: 512, 3: 96})
"""Side of the tile, a scene of its own, that is timed, in px."""

FLOATS = Precision(name="fp32", channels_last=True, why="asked")

HEADS = (
    "network", "stride", "receptive field", "halo", "work, tile of 8192 px (384)",
    "work, 4096 px (192)", "parameters", "weights", "strips", "greatest logit difference",
    "labels other / unexplained", "px/s",
)  # fmt: skip
"""Sizes in px, those of 3-D in brackets; differences in deviations of the logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What follows from the layers alone."""

    stride: int
    field: tuple[int, ...]
    halo: Halo
    """With half the window of image pooling."""

    work: tuple[float, ...]
    """Multiply-adds of interior tiles over those of one pass, by the share of the scene."""

    parameters: int

    weights: int
    """Numbers in the file of weights: parameters, and the statistics of batch norm."""


def count(architecture: Architecture | CustomArchitecture) -> Counted:
    """Count a network that has no memory for its weights, unless it must be probed."""
    if isinstance(architecture, CustomArchitecture):
        return _count_probed(architecture)
    dims = architecture.dims
    with torch.device("meta"):
        network = build_network(architecture, bands=3, classes=21).eval()
    network.pool_over(CROPS[dims])
    return Counted(
        stride=network.stride,
        field=receptive_field(stages_of(network)).shape,
        halo=reach_of(network).halo_with_window,
        work=tuple(_interior_work(network, side) for side in TILES[dims]),
        parameters=sum(weight.numel() for weight in network.parameters()),
        weights=sum(weight.numel() for weight in network.state_dict().values()),
    )


def _count_probed(architecture: CustomArchitecture) -> Counted:
    """Count a network that runs as one: its halo as NaN shows it, its work as the area it reads."""
    assert architecture.entry_point is not None
    module = network_of_entry_point(architecture.entry_point, architecture.arguments)
    network = CustomNetwork(module, architecture, bands=3, classes=21).eval()
    halo = probe_custom(network).halo
    assert halo is not None
    around = [a + b for a, b in zip(halo.before, halo.after, strict=True)]
    return Counted(
        stride=network.stride,
        field=tuple(network.stride + side for side in around),
        halo=halo,
        work=tuple(
            math.prod((side + more) / side for more in around) for side in TILES[architecture.dims]
        ),
        parameters=sum(weight.numel() for weight in module.parameters()),
        weights=sum(weight.numel() for weight in module.state_dict().values()),
    )


def _interior_work(network: DeepLab, side: int) -> float:
    dims, reach = network.architecture.dims, reach_of(network)
    scene = 5 * side + reach.endpoint
    grid = Grid(
        shape=(scene,) * dims, tile=(side,) * dims, stride=reach.stride, endpoint=reach.endpoint
    )
    none = Halo.uniform(0, ndim=dims)
    sweep = Pass(case="", name="", grid=grid, reach=reach, crf_halo=none)
    return work_ratio(network, scene, [sweep.tile(len(grid) // 2)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What two strips and a tile show."""

    strips: tuple[tuple[int, ...], ...]
    """Their shapes, in px."""

    differences: tuple[Difference, ...]
    """Of the tiles of each strip from one pass over it."""

    px_s: float
    """Pixels per second of one tile, on ``THREADS`` threads."""


def measure(
    architecture: Architecture | CustomArchitecture, counted: Counted, folder: Path
) -> Measured:
    """Run a network with fresh weights."""
    if isinstance(architecture, CustomArchitecture):
        architecture = replace(architecture, arguments={**architecture.arguments, "classes": 6})
    bundle = new_bundle(folder, architecture=architecture, bands=3, classes=6, seed=7)
    shapes = strips(counted, architecture.dims)
    return Measured(
        strips=shapes,
        differences=tuple(compare(Scene.of(bundle, noise(shape)), counted) for shape in shapes),
        px_s=speed(bundle),
    )


def strips(counted: Counted, dims: int) -> tuple[tuple[int, ...], ...]:
    """Shapes in px, each long along one axis: its first and last tiles lack the other end."""
    long = counted.halo.largest + 4 * _strip_tile(counted, dims) - 3
    thin = 2 * counted.stride + 11
    return tuple(tuple(long if a == axis else thin for a in range(dims)) for axis in range(dims))


def _strip_tile(counted: Counted, dims: int) -> int:
    return -(-STRIP_TILE[dims] // counted.stride) * counted.stride


def noise(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Three bands of texture, (C, *S) of mean 0 and deviation 1."""
    image_CS = np.stack([texture(shape, seed=seed) for seed in range(3)]).astype(np.float32)
    return (image_CS - image_CS.mean()) / image_CS.std()


def compare(scene: Scene, counted: Counted) -> Difference:
    """Tiles against one pass over the strip."""
    reference = PASSES["fp32"][0]
    whole_KS = whole_pass(scene, reference, dtype=torch.float32)
    found = Difference(reference.tolerance, deviation=float(whole_KS.std()))
    parts, side = 0, _strip_tile(counted, len(scene.shape))
    for tile, tile_KS in in_tiles(scene, side, precision=FLOATS):
        parts += tile.read != Region.whole(scene.frame.shape)
        box = tile.core.slices(within=Region.whole(scene.shape))
        found.add(tile_KS, whole_KS[(slice(None), *box)])
    assert parts >= 2, "tiles read all of the strip: nothing was compared"
    return found


def speed(bundle: Bundle) -> float:
    """Pixels per second of a tile that is a scene, with its context where it pools."""
    predictor = Predictor(bundle, device="cpu", precision=FLOATS, context="window", threads=THREADS)
    dims = bundle.architecture.dims
    scene = Scene.of(bundle, noise((TIMED[dims],) * dims))
    seconds = []
    for _ in range(2):  # the first also pays for what is made once
        image_CS = scene.image_CS.copy()
        start = time.perf_counter()
        predictor.logits(image_CS, scene.frame, scored=Region.whole(scene.shape))
        seconds.append(time.perf_counter() - start)
    return math.prod(scene.shape) / min(seconds)


def row(name: str, counted: Counted, measured: Measured | None) -> str:
    """One line of the table; without what is measured where that is None."""
    cells = [
        name,
        str(counted.stride),
        _sides(counted.field),
        _sides(tuple(map(max, counted.halo.before, counted.halo.after))),
        *(f"{ratio:.3f}" for ratio in counted.work),
        f"{counted.parameters:,}",
        f"{counted.weights * 4 / 1e6:.1f} MB",
    ]
    if measured is not None:
        found = measured.differences
        cells += [
            " x ".join(map(str, measured.strips[0])),
            f"{max(one.greatest for one in found):.1e}",
            f"{sum(one.labels for one in found)} / {sum(one.unexplained for one in found)}",
            f"{measured.px_s:,.0f}",
        ]
    return f"| {' | '.join(cells)} |"


def _sides(sides: tuple[int, ...]) -> str:
    return str(sides[0]) if len(set(sides)) == 1 else " x ".join(map(str, sides))


def main() -> None:
    """Print the table; fail where tiles differ by more than was promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", action="append", choices=list(NETWORKS), help="all if absent")
    parser.add_argument("--counted", action="store_true", help="leave out what takes time")
    asked = parser.parse_args()
    heads = HEADS if not asked.counted else HEADS[:-4]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}", flush=True)
    good = True
    for name in asked.network or NETWORKS:
        architecture, measured = NETWORKS[name], None
        counted = count(architecture)
        if not asked.counted:
            with tempfile.TemporaryDirectory(prefix="terravox-bench-") as folder:
                measured = measure(architecture, counted, Path(folder) / "bundle")
            good &= all(one.fine for one in measured.differences)
        print(row(name, counted, measured), flush=True)
    sys.exit(not good)


if __name__ == "__main__":
    main()
