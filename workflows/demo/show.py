"""The demo: the main job on a generated scene and on a real brain, scored against the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adapters.geotiff import GeoTiffSource
from adapters.uri import open_source
from adapters.zarr_store import ZarrStore
from pipeline.domain import Region
from pipeline.errors import PlanError
from pipeline.metrics import Confusion, Scores
from pipeline.models.bundle import Bundle, load_bundle
from workflows.config import SegmentOptions
from workflows.demo import volume
from workflows.demo.baseline import GaussianClassifier, fit_to_scene, fit_to_volume
from workflows.demo.scene import DEMO_SEED, write_scene
from workflows.segmenting import segment

BUNDLES = Path(__file__).parent / "bundles"
BLOCK = (1024, 1024)
Stop = Callable[[], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One finished part of the demo."""

    manifest: Mapping[str, Any]
    bundle: Bundle
    network: Scores
    baseline: Scores
    """A classifier that sees one pixel at a time, fitted to what the network was trained on."""


def run_demo(which: str, *, out: Path, size: int, stop: Stop) -> dict[str, Any]:
    """Run the parts asked for, show a table of each, and return their figures.

    Raises PlanError for a part that does not exist, and what ``segment`` raises.
    """
    parts = {"raster": show_raster, "volume": show_volume}
    if which not in (*parts, "both"):
        raise PlanError(f"demo {which}: choose raster, volume or both")
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    results = {}
    for name, show in parts.items():
        if which in (name, "both") and not stop():
            shown = show(out.resolve(), size=size, console=console, stop=stop)
            if shown is None:
                break
            _tell(shown, console)
            results[name] = _figures(shown)
    console.print(
        "\nRasters open in QGIS, volumes in any NIfTI viewer; each report.html in a browser."
        f"\nThe runs: mlflow ui --backend-store-uri sqlite:///{out.resolve() / 'mlflow.db'}",
        highlight=False,
        soft_wrap=True,
    )
    return results


def show_raster(out: Path, *, size: int, console: Console, stop: Stop) -> Shown | None:
    """Generate a scene, segment it, score it; None when told to stop."""
    scene, truth = out / f"scene-{size}.tif", out / f"scene-{size}-truth.tif"
    if not (scene.exists() and truth.exists()):
        _generate(scene, truth, size=size, console=console)
    bundle = load_bundle(BUNDLES / "fields")
    manifest = segment(
        scene,
        out / f"scene-{size}-mask.tif",
        model=bundle.path,
        options=SegmentOptions(experiment="terravox-demo"),
        stop=stop,
    )
    if manifest["output"] is None:
        return None
    console.print("scoring against the truth, and a per-pixel classifier beside it")
    return Shown(
        manifest=manifest,
        bundle=bundle,
        network=_score_files(Path(manifest["output"]), truth, bundle),
        baseline=_score_classifier(fit_to_scene(), scene, truth, bundle),
    )


def show_volume(out: Path, *, size: int, console: Console, stop: Stop) -> Shown | None:
    """Segment the MNI152 brain and score the half that was not trained on."""
    brain = volume.load_template()
    bundle = load_bundle(BUNDLES / "brain")
    output = out / "brain-mask.nii.gz"
    manifest = segment(
        volume.template_path("t1"),
        output,
        model=bundle.path,
        options=SegmentOptions(experiment="terravox-demo"),
        stop=stop,
    )
    if manifest["output"] is None:
        return None
    store = ZarrStore(Path(f"{output}.run/mask.zarr"))
    image_CS, label_S = brain.part(brain.scored)
    classifier = fit_to_volume(brain)
    return Shown(
        manifest=manifest,
        bundle=bundle,
        network=_score(store.read(brain.scored), label_S, bundle),
        baseline=_score(classifier.predict(image_CS), label_S, bundle),
    )


def _generate(scene: Path, truth: Path, *, size: int, console: Console) -> None:
    """Both files under temporary names first: a half-written scene is never taken for one."""
    drafts = [path.with_name(f".draft-{path.name}") for path in (scene, truth)]
    with Progress(console=console) as progress:
        task = progress.add_task(f"generating a scene of {size} x {size} px")
        write_scene(
            *drafts,
            size=size,
            seed=DEMO_SEED,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    for draft, path in zip(drafts, (scene, truth), strict=True):
        draft.replace(path)


def _score(prediction_S: NDArray[Any], truth_S: NDArray[Any], bundle: Bundle) -> Scores:
    confusion = Confusion(bundle.class_values)
    confusion.add(prediction_S, truth_S, ignore=bundle.mask_nodata)
    return confusion.scores()


def _score_files(mask: Path, truth: Path, bundle: Bundle) -> Scores:
    confusion = Confusion(bundle.class_values)
    with rasterio.open(mask) as predicted, rasterio.open(truth) as expected:
        for region in Region.whole(expected.shape).blocks(BLOCK):
            window = tuple(zip(region.start, region.stop, strict=True))
            confusion.add(
                predicted.read(1, window=window),
                expected.read(1, window=window),
                ignore=bundle.mask_nodata,
            )
    return confusion.scores()


def _score_classifier(
    classifier: GaussianClassifier, scene: Path, truth: Path, bundle: Bundle
) -> Scores:
    confusion = Confusion(bundle.class_values)
    source: GeoTiffSource = GeoTiffSource(scene)
    expected = open_source(str(truth))
    for region in Region.whole(source.info.shape).blocks(BLOCK):
        block = source.read(region)
        labels_S = np.where(block.valid_S, classifier.predict(block.image_CS), bundle.mask_nodata)
        truth_S = expected.read(region).image_CS[0]
        confusion.add(labels_S.astype(np.uint8), truth_S, ignore=bundle.mask_nodata)
    return confusion.scores()


def _tell(shown: Shown, console: Console) -> None:
    rows = shown.manifest["classes"]
    size, unit, scale = ("volume_ml", "ml", 1.0)
    if "area_m2" in rows[0]:
        size, unit, scale = ("area_m2", "ha", 1e-4)
    measure = "Dice" if unit == "ml" else "IoU"
    table = Table("class", unit, measure, f"{measure} per-pixel classifier")
    ours, theirs = (_by_class(s, measure) for s in (shown.network, shown.baseline))
    for row, mine, other in zip(rows, ours, theirs, strict=True):
        table.add_row(row["name"], f"{row[size] * scale:,.1f}", f"{mine:.3f}", f"{other:.3f}")
    table.add_section()
    table.add_row("mean", "", f"{np.nanmean(ours):.3f}", f"{np.nanmean(theirs):.3f}")
    manifest = shown.manifest
    rate = ", ".join(f"{value:.2f} {key}" for key, value in manifest["throughput"].items())
    run = Path(f"{manifest['output']}.run")
    console.print(table)
    console.print(
        f"{manifest['tiles']['done']} tiles in {manifest['seconds']:.1f} s ({rate}),"
        f" {manifest['precision']} on {manifest['device']},"
        f" CRF {'on' if manifest['crf'] else 'off'}"
        f"\n  mask    {manifest['output']}\n  report  {run / 'report.html'}",
        highlight=False,
        soft_wrap=True,
    )


def _by_class(scores: Scores, measure: str) -> NDArray[np.float64]:
    return scores.dice_K if measure == "Dice" else scores.iou_K


def _figures(shown: Shown) -> dict[str, Any]:
    names = [look.name for look in shown.bundle.classes]
    return {
        "output": shown.manifest["output"],
        "seconds": shown.manifest["seconds"],
        "throughput": shown.manifest["throughput"],
        "iou": dict(zip(names, shown.network.iou_K.round(4).tolist(), strict=True)),
        "dice": dict(zip(names, shown.network.dice_K.round(4).tolist(), strict=True)),
        "mean_iou": round(shown.network.mean_iou, 4),
        "mean_dice": round(shown.network.mean_dice, 4),
        "baseline_mean_iou": round(shown.baseline.mean_iou, 4),
        "baseline_mean_dice": round(shown.baseline.mean_dice, 4),
    }
