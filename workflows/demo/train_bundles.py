"""Train the bundles that the demo ships: ``python -m workflows.demo.train_bundles``.

Each learns from data that the demo does not score, and its CRF is chosen on other data again.
Axes in array names: B batch, C channel, K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.crf.dense import refine
from pipeline.crf.engine import engine_named, pick_engine
from pipeline.crf.params import CrfParams
from pipeline.domain import Region
from pipeline.inference.normalise import normalise
from pipeline.metrics import Confusion, Scores
from pipeline.models.bundle import Architecture, Bundle, ClassInfo, InputSpec, Scaling, save_bundle
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.frame import Frame
from pipeline.ports import Block
from pipeline.training.crops import CropSampler, CropSpec, Sample
from pipeline.training.fit import Recipe, StepDone, fit
from workflows.demo import landscape, volume
from workflows.demo.landscape import Labelled, scattered
from workflows.demo.scene import PIXEL_SIZE_M, TRAINING_SEED, VALIDATION_SEED

log = logging.getLogger(__name__)

BUNDLES = Path(__file__).parent / "bundles"


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """All that makes one bundle."""

    bundle: Bundle
    """What it will be; without weights, scores and CRF yet."""

    learn: tuple[Labelled, ...]
    """What the weights see."""

    tune: tuple[Labelled, ...]
    """What the CRF is chosen on."""

    batch: int
    flips: tuple[int, ...]
    recipe: Recipe

    crfs: tuple[Mapping[str, Any], ...]
    """CRFs to choose from."""

    spacing: tuple[float, ...]
    unit: Literal["m", "mm"]


def fields_course() -> Course:
    """Crops and their disease in four bands at 10 m."""
    learn = tuple(scattered(40, side=512, seed=TRAINING_SEED))
    return Course(
        bundle=Bundle(
            name="fields",
            version=1,
            architecture=_slim(dims=2, output_stride=4),
            classes=_classes(landscape.CLASSES, landscape.COLORS),
            ignore_index=landscape.IGNORED,
            input=InputSpec(
                bands=landscape.BANDS,
                dtype="uint16",
                scaling=_z_score(learn),
                pixel_size_m=PIXEL_SIZE_M,
            ),
            crop=(256, 256),
        ),
        learn=learn,
        tune=tuple(scattered(6, side=512, seed=VALIDATION_SEED)),
        batch=6,
        flips=(0, 1),
        recipe=_recipe(steps=2800, lr=3e-3),
        crfs=tuple(
            _crf(weight, position=position, value=value, bands=landscape.BANDS[1:], top=5000)
            for weight, position, value in ((2.0, 6, 8), (4.0, 4, 5), (4.0, 6, 8), (4.0, 6, 12))
        ),
        spacing=(PIXEL_SIZE_M, PIXEL_SIZE_M),
        unit="m",
    )


def brain_course() -> Course:
    """Grey and white matter in a T1 volume at 1 mm."""
    brain = volume.load_template()
    # The brain lies within these z and x; the last 24 mm of the half trained on choose the CRF.
    middle = brain.trained.stop[1]
    learn = brain.part(Region((0, 0, 16), (160, middle - 24, 180)))
    tune = brain.part(Region((0, middle - 24, 16), (160, middle, 180)))
    return Course(
        bundle=Bundle(
            name="brain",
            version=1,
            architecture=_slim(dims=3, output_stride=2),
            classes=_classes(volume.CLASSES, volume.COLORS),
            ignore_index=255,
            input=InputSpec(
                bands=1,
                dtype="uint8",
                scaling=_z_score([learn]),
                spacing_mm=brain.spacing_mm,
            ),
            crop=(48, 48, 48),
        ),
        learn=(learn,),
        tune=(tune,),
        batch=4,
        flips=(0, 1, 2),
        recipe=_recipe(steps=2000, lr=3e-3),
        crfs=tuple(
            _crf(weight, position=position, value=value, bands=("1",), top=255)
            for weight, position, value in ((4.0, 3, 6), (8.0, 3, 4), (16.0, 3, 4), (16.0, 5, 3))
        ),
        spacing=brain.spacing_mm,
        unit="mm",
    )


def train(course: Course, out: Path) -> Bundle:
    """Train the network of ``course``, choose its CRF, and write the bundle to ``out``."""
    bundle, architecture = course.bundle, course.bundle.architecture
    assert isinstance(architecture, Architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(course.recipe.seed)
        network = build_network(
            architecture, bands=bundle.input.band_count, classes=len(bundle.classes)
        )
    spec = CropSpec(
        crop=bundle.crop,
        batch=course.batch,
        flips=course.flips,
        ignore_index=bundle.ignore_index,
    )
    samples = [Sample(normalised(image_CS, bundle), label_S) for image_CS, label_S in course.learn]
    fit(network, CropSampler(samples, spec=spec), recipe=course.recipe, on_step=_log_step)
    return save_bundle(out, _judged(course, network), network.state_dict())


def _judged(course: Course, network: DeepLab) -> Bundle:
    """The bundle with its scores on the tuning data, and with a CRF if one improves them."""
    bundle = course.bundle
    guesses = [probabilities(network, normalised(image_CS, bundle)) for image_CS, _ in course.tune]
    plain = _score(course, guesses, crf=None)
    log.info("%s without CRF: mean IoU %.4f, IoU %s", bundle.name, plain.mean_iou, plain.iou_K)
    best, chosen = plain, None
    for crf in course.crfs:
        scores = _score(course, guesses, crf=crf)
        log.info("%s with CRF %s: mean IoU %.4f", bundle.name, crf, scores.mean_iou)
        if scores.mean_iou > best.mean_iou:
            best, chosen = scores, crf
    metrics = {"mean_iou_without_crf": plain.mean_iou, "mean_iou": best.mean_iou}
    training = {
        "data": [_digest(course.learn)],
        "metrics": {name: round(value, 4) for name, value in metrics.items()},
    }
    return replace(bundle, crf=chosen, training=training)


def probabilities(network: DeepLab, image_CS: NDArray[np.float32]) -> NDArray[np.float32]:
    """(K, *S) float32, sums to 1 over K."""
    shape = image_CS.shape[1:]
    with torch.inference_mode():
        logits_BKS = network(torch.from_numpy(image_CS)[None], Frame((0,) * len(shape), shape))
        prob_KS: NDArray[np.float32] = logits_BKS[0].float().softmax(dim=0).numpy()
    return prob_KS


def _score(
    course: Course, guesses: Iterable[NDArray[np.float32]], *, crf: Mapping[str, Any] | None
) -> Scores:
    """Scores on the tuning data, after the CRF where there is one."""
    bundle = course.bundle
    confusion = Confusion(bundle.class_values)
    for prob_KS, (image_CS, label_S) in zip(guesses, course.tune, strict=True):
        if crf is not None:
            prob_KS = _refined(prob_KS, image_CS, course=course, crf=crf)
        prediction_S = prob_KS.argmax(axis=0).astype(np.uint8)
        confusion.add(prediction_S, label_S, ignore=bundle.ignore_index)
    return confusion.scores()


def _refined(
    prob_KS: NDArray[np.float32],
    image_CS: NDArray[Any],
    *,
    course: Course,
    crf: Mapping[str, Any],
) -> NDArray[np.float32]:
    bands = course.bundle.input.bands
    channels = ("1",) if isinstance(bands, int) else bands
    params = CrfParams.from_mapping(crf).resolve(
        course.spacing, unit=course.unit, channels=channels
    )
    origin = (0,) * (image_CS.ndim - 1)
    valid_S = _valid(image_CS, course.bundle)
    return refine(
        prob_KS,
        block=Block(image_CS, valid_S),
        origin=origin,
        params=params,
        engine=engine_named(pick_engine(params.engine, device="cpu"), device="cpu", threads=1),
    )


def _valid(image_CS: NDArray[Any], bundle: Bundle) -> NDArray[np.bool_]:
    """The scene's nodata is 0 in all bands; the volume has none."""
    if bundle.architecture.dims == 3:
        return np.ones(image_CS.shape[1:], bool)
    valid_S: NDArray[np.bool_] = (image_CS != landscape.NODATA).any(axis=0)
    return valid_S


def normalised(image_CS: NDArray[Any], bundle: Bundle) -> NDArray[np.float32]:
    """The network's input, (C, *S) float32, 0 where invalid."""
    return normalise(Block(image_CS, _valid(image_CS, bundle)), bundle.input.scaling)


def _slim(*, dims: int, output_stride: int) -> Architecture:
    return Architecture(
        family="v3",
        backbone="slim",
        dims=dims,
        output_stride=output_stride,
        rates=(2, 4, 6),
        image_pooling=False,
    )


def _classes(names: Iterable[str], colors: Iterable[str]) -> tuple[ClassInfo, ...]:
    pairs = enumerate(zip(names, colors, strict=True))
    return tuple(ClassInfo(id=i, name=name, color=color) for i, (name, color) in pairs)


def _z_score(learn: Iterable[Labelled]) -> Scaling:
    """Mean and deviation of the labelled pixels, in round numbers."""
    pixels_CN = np.concatenate([image[:, label != 255] for image, label in learn], axis=1)
    return Scaling(
        type="z-score",
        mean=tuple(round(float(band.mean(dtype=np.float64)), 1) for band in pixels_CN),
        std=tuple(round(float(band.std(dtype=np.float64)), 1) for band in pixels_CN),
    )


def _recipe(*, steps: int, lr: float) -> Recipe:
    return Recipe(
        steps=steps,
        optimizer="adamw",
        lr=lr,
        weight_decay=1e-2,
        precision="bf16",
        seed=0,
        threads=1,
        frozen_steps=steps // 2,
        norm_batches=60,
    )


def _crf(
    weight: float, *, position: float, value: float, bands: tuple[str, ...], top: float
) -> Mapping[str, Any]:
    """An appearance kernel alone, for three iterations.

    Smoothness beside it, or five iterations, moved no mean IoU by more than 0.001 in trials.
    """
    appearance = {
        "weight": weight,
        "position": position,
        "value": value,
        "bands": list(bands),
        "range": [0, top],
    }
    return {"iterations": 3, "appearance": appearance}


def _digest(learn: Iterable[Labelled]) -> str:
    """SHA-256 of the training data."""
    total = hashlib.sha256()
    for image_CS, label_S in learn:
        total.update(image_CS.tobytes())
        total.update(label_S.tobytes())
    return f"sha256:{total.hexdigest()}"


def _log_step(done: StepDone) -> None:
    if done.step % 50 == 0:
        log.info("step %d: loss %.4f", done.step, done.loss)


def main() -> None:
    """Train both bundles, or the one named."""
    courses = {"fields": fields_course, "brain": brain_course}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(courses))
    parser.add_argument("--out", type=Path, default=BUNDLES)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name, course in courses.items():
        if arguments.only in (None, name):
            train(course(), arguments.out / name)


if __name__ == "__main__":
    main()
