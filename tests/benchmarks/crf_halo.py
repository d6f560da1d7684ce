"""``make bench-crf-halo``: the CRF in tiles against the CRF in one piece, on outputs of networks.

Both demo bundles on images they never saw, and a network that learned a corner of Zion. What they
say is kept as ``segment --scores float16`` keeps it, and refined from there, tile by tile.
K class, S space: (y, x) or (z, y, x).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from benchmarks.halo_chart import Curve, draw
from numpy.typing import NDArray
from zion import HELD_BACK, land_cover, learn_corner, zion_scene

from adapters.memory import MemoryStore
from adapters.uri import open_source
from pipeline.crf.params import CrfParams
from pipeline.crf.presets import PRESETS
from pipeline.domain import Region
from pipeline.metrics import Confusion
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.models.input_spec import Legend
from pipeline.ports import Source
from pipeline.refine_tile import CrfModel, RefineTiles
from pipeline.training.fit import Recipe
from workflows.case import Case, open_case
from workflows.config import RefineOptions, SegmentOptions
from workflows.demo.scene import DEMO_SEED, write_scene
from workflows.demo.show import BUNDLES
from workflows.demo.volume import load_template
from workflows.refine_plan import RefinePlan, Wish, make_refine_plan
from workflows.refining import refine
from workflows.run_scores import open_scores
from workflows.segmenting import segment

DATA = Path(os.environ.get("TERRAVOX_DATA", "../shared/data"))
SIDE = 1536
"""Of the demo's scene, in px."""

BRAIN_ZX = ((0, 160), (16, 180))
"""Where the brain lies, in voxels."""

ZION_RANGE = [6000, 16000]
"""Of blue, green and red: 98 of 100 values of the corner lie within."""

RECIPE = Recipe(
    steps=600,
    optimizer="adamw",
    lr=3e-3,
    weight_decay=1e-2,
    precision="fp32",
    seed=0,
    threads=1,
    frozen_steps=200,
    norm_batches=20,
)
SERIAL = RefineOptions(backend="serial", tracking_uri="none", device="cpu")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """An image, and what a network says of it."""

    name: str
    case: Case
    bundle: Bundle

    run: Path
    """Of ``segment``, with scores."""

    scores: Source
    legend: Legend

    truth_S: NDArray[Any]

    scored: tuple[slice, ...]
    """Where the truth may be asked: not trained on."""

    guide: Mapping[str, Any]
    """Bands and range of an energy that is not the bundle's own."""

    @property
    def volume(self) -> bool:
        """Or a raster."""
        return self.bundle.architecture.dims == 3

    @property
    def tile(self) -> int:
        """Side, in px or voxels."""
        return 64 if self.volume else 512

    @property
    def halos(self) -> tuple[int, ...]:
        """That are tried, beside the one taken where none is asked for."""
        return (0, 4, 8, 16, 32) if self.volume else (0, 16, 32, 64, 128, 256)


class Alone:
    """A guard of a run that has no directory."""

    def check(self) -> None:
        """Nobody else is there."""


def fields(out: Path) -> Seen:
    """The demo's raster network on a scene of the demo's landscape."""
    image, truth = out / f"scene-{SIDE}.tif", out / f"scene-{SIDE}-truth.tif"
    if not truth.exists():
        write_scene(image, truth, size=SIDE, seed=DEMO_SEED)
    whole = Region.whole((SIDE, SIDE))
    return _seen(
        "fields",
        image,
        load_bundle(BUNDLES / "fields"),
        truth_S=open_source(str(truth)).read(whole).image_CS[0],
        scored=whole.slices(within=whole),
        guide={"bands": ["red", "green", "blue"], "range": [0, 5000]},
        out=out,
    )


def zion(out: Path) -> Seen:
    """A network that learned the corner of Zion, on all of it; scored far from the corner.

    It is trained once and found again: remove it to train another.
    """
    where = out / "zion-model"
    if not where.exists():
        learn_corner(DATA, where, recipe=RECIPE)
    return _seen(
        "Zion",
        zion_scene(DATA).resolve(),
        load_bundle(where),
        truth_S=land_cover(DATA),
        scored=HELD_BACK,
        guide={"bands": ["red", "green", "blue"], "range": ZION_RANGE},
        out=out,
    )


def brain(out: Path) -> Seen:
    """The demo's volume network on the half of the brain that was not trained on."""
    template, image = load_template(), out / "brain.nii"
    (low, high), (left, right) = BRAIN_ZX
    front, back = template.scored.start[1], template.scored.stop[1]
    t1_CS, label_S = template.part(Region((low, front, left), (high, back, right)))
    volume = nib.Nifti1Image(t1_CS[0].transpose(2, 1, 0), np.diag([*template.spacing_mm[::-1], 1]))
    volume.header.set_xyzt_units("mm")
    nib.save(volume, image)
    return _seen(
        "brain",
        image,
        load_bundle(BUNDLES / "brain"),
        truth_S=label_S,
        scored=(slice(None),) * 3,
        guide={"bands": ["1"], "range": [0, 255]},
        out=out,
    )


def _seen(name: str, image: Path, bundle: Bundle, *, out: Path, **rest: Any) -> Seen:
    """Run the network, without CRF, in the tiles of the product."""
    suffix = ".nii" if bundle.architecture.dims == 3 else ".tif"
    mask = out / f"{name}-{bundle.digest[-12:]}{suffix}"
    options = SegmentOptions(
        backend="serial", tracking_uri="none", device="cpu", precision="fp32", crf="off",
        scores="float16",
    )  # fmt: skip
    segment(image, mask, model=bundle.path, options=options)
    case, run = open_case(image, SERIAL), Path(f"{mask}.run")
    scores, legend = open_scores(run, case, scratch=run)
    assert legend is not None
    return Seen(name=name, case=case, bundle=bundle, run=run, scores=scores, legend=legend, **rest)


def energies(seen: Seen) -> dict[str, Mapping[str, Any]]:
    """The CRFs whose halos are tried: what the bundle brings, and two that reach far."""
    own = {"own": seen.bundle.crf} if seen.bundle.crf else {}
    if seen.volume:
        return own
    wide = {
        "smoothness": {"weight": 3, "position": 3},
        "appearance": {"weight": 4, "position": 80, "value": 13, **seen.guide},
    }
    return own | {"v2-resnet101": {"preset": "v2-resnet101", **seen.guide}, "(80, 13)": wide}


def planned(seen: Seen, crf: Mapping[str, Any], *, tile: int) -> tuple[RefinePlan, RefineTiles]:
    """As ``terravox refine`` plans it, and its work on a tile."""
    wish = Wish(
        case=seen.case,
        scores=seen.scores,
        scores_path=seen.run,
        crf=CrfParams.from_mapping(crf),
        classes=seen.legend,
    )
    plan = make_refine_plan(wish, SERIAL.model_copy(update={"tile": tile}), found=None)
    found = plan.resolved
    tiles = RefineTiles(
        key=plan.tiles.fingerprint,
        model=CrfModel(engine=found.engine, device=found.device, threads=found.threads),
        source=seen.case.source,
        scores=seen.scores,
        crf=plan.crf,
        legend=plan.legend,
        mask=MemoryStore(plan.sweep.grid.shape, dtype=plan.legend.dtype, fill=0),
        guard=Alone(),
    )
    return plan, tiles


def refined(seen: Seen, crf: Mapping[str, Any], *, tile: int) -> NDArray[np.float32]:
    """Probabilities after the CRF, (K, *S) float32; 0 where invalid. Each tile keeps its core."""
    plan, tiles = planned(seen, crf, tile=tile)
    shape, engine = plan.sweep.grid.shape, tiles.model.load()
    prob_KS = np.zeros((len(plan.legend.classes), *shape), np.float32)
    for one in plan.sweep.tiles():
        done = tiles.compute(engine, one, tiles.read(one))
        if done.prob_KS is not None:
            box = one.core.slices(within=Region.whole(shape))
            prob_KS[(slice(None), *box)] = np.where(done.valid_S, done.prob_KS, 0)
    return prob_KS


def whole(seen: Seen, crf: Mapping[str, Any]) -> NDArray[np.float32]:
    """The same in one tile."""
    return refined(seen, {**crf, "halo": 0}, tile=max(seen.case.source.info.shape))


def labels(seen: Seen, prob_KS: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Class ids, nodata where invalid."""
    values = np.array(seen.bundle.class_values, np.uint8)
    found_S: NDArray[np.uint8] = values[prob_KS.argmax(axis=0)]
    return np.where(prob_KS.any(axis=0), found_S, seen.bundle.mask_nodata).astype(np.uint8)


def curve(seen: Seen, name: str, crf: Mapping[str, Any]) -> Curve:
    """A printed row for each halo: how tiles differ from one piece."""
    one_KS = whole(seen, crf)
    one_S = labels(seen, one_KS)
    pixels = int((one_S != seen.bundle.mask_nodata).sum())
    usual = planned(seen, crf, tile=seen.tile)[0].sweep.crf_halo.largest
    shares: dict[int, float] = {}
    for halo in sorted({*seen.halos, usual}):
        plan, _ = planned(seen, {**crf, "halo": halo}, tile=seen.tile)
        tiled_KS = refined(seen, {**crf, "halo": halo}, tile=seen.tile)
        differ = int((labels(seen, tiled_KS) != one_S).sum())
        shares[halo] = differ / pixels
        print(
            f"{seen.name:8}{name:14}{halo:>6}{'*' if halo == usual else ' '}"
            f"{plan.sweep.read_ratio:>7.2f}{differ:>9}{shares[halo]:>10.1e}"
            f"{np.abs(tiled_KS - one_KS).max():>10.1e}",
            flush=True,
        )
    return Curve(name=f"{seen.name}, CRF {name}", shares=shares, usual=usual)


def same_as_command(seen: Seen, crf: Mapping[str, Any]) -> bool:
    """Whether ``terravox refine`` writes the labels that the row of its halo was counted from."""
    energy = CrfParams.from_mapping(crf)
    options = SERIAL.model_copy(update={"tile": seen.tile})
    with tempfile.TemporaryDirectory(prefix="terravox-bench-") as folder:
        mask = Path(folder) / ("mask.nii" if seen.volume else "mask.tif")
        refine(seen.case.path, mask, scores=seen.run, crf=energy, options=options)
        written = open_source(str(mask)).read(Region.whole(seen.case.source.info.shape))
    mine_S = labels(seen, refined(seen, crf, tile=seen.tile))
    return bool((written.image_CS[0] == mine_S).all())


def told(seen: Seen, prob_KS: NDArray[np.float32]) -> str:
    """Mean IoU and accuracy against the truth, where it may be asked."""
    confusion = Confusion(seen.bundle.class_values)
    found_S, truth_S = labels(seen, prob_KS)[seen.scored], seen.truth_S[seen.scored]
    confusion.add(found_S, truth_S.astype(np.uint8), ignore=seen.bundle.mask_nodata)
    scores = confusion.scores()
    return f"{scores.mean_iou:.3f} ({scores.accuracy:.3f})".rjust(16)


def worth(seen: Seen) -> str:
    """A row: the network alone, and after each CRF in one piece."""
    plain_KS = seen.scores.read(Region.whole(seen.case.source.info.shape)).image_CS
    row = f"{seen.name:8}{told(seen, plain_KS)}"
    crfs = {name: {"preset": name, **seen.guide} for name in PRESETS}
    for crf in (seen.bundle.crf, *crfs.values()):
        row += told(seen, whole(seen, crf)) if crf else f"{'-':>16}"
    return row


SCENES: dict[str, Callable[[Path], Seen]] = {"fields": fields, "zion": zion, "brain": brain}


def main() -> None:
    """Print both tables and draw the first; fail where the command says otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench-out/crf-halo"))
    parser.add_argument("--only", choices=list(SCENES), action="append")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    out = asked.out.resolve()
    scenes = [SCENES[name](out) for name in asked.only or SCENES]
    curves = []
    print(f"{'image':8}{'CRF':14}{'halo':>6}{'work':>8}{'differ':>9}{'share':>10}{'max |dQ|':>10}")
    for seen in scenes:
        for name, crf in energies(seen).items():
            curves.append(curve(seen, name, crf))
        if not same_as_command(seen, next(iter(energies(seen).values()))):
            sys.exit(f"{seen.name}: `terravox refine` wrote other labels")
    draw(curves, out / "crf-halo.png")
    print(f"picture: {out / 'crf-halo.png'}\nmean IoU (accuracy), the CRF in one piece")
    print(f"{'image':8}" + "".join(f"{name:>16}" for name in ("network", "own", *PRESETS)))
    for seen in scenes:
        print(worth(seen), flush=True)


if __name__ == "__main__":
    main()
