"""A bundle from somebody else's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import BundleError
from pipeline.models.architecture import Architecture
from pipeline.models.bundle import Bundle, save_bundle
from pipeline.models.deeplab import DeepLab, build_network
from pipeline.models.input_spec import ClassInfo, InputSpec
from pipeline.models.layouts.checkpoint import Checkpoint
from pipeline.models.layouts.known_classes import KNOWN_CLASSES
from pipeline.models.layouts.layout import Layout, bring, their_name
from pipeline.models.layouts.other_bands import filters_for, scaling_for
from pipeline.models.layouts.registry import layout_named
from pipeline.models.published import published


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a file of weights does not say. None: as in the layout's published files."""

    family: str | None = None
    """``v3`` or ``v3plus``: the head that a trunk alone is given."""

    output_stride: int | None = None
    """Pixels between features, as the weights were trained."""

    rates: tuple[int, ...] | None = None
    """Dilations of ASPP at that stride."""

    bands: tuple[str, ...] | None = None
    """Names and order of the bands, where they are not those of the weights."""

    classes: int | tuple[ClassInfo, ...] | None = None
    """Names, or the number alone, which only a trunk alone needs."""

    crop: tuple[int, ...] | None = None
    """Training window in px; the window of image pooling."""


def import_bundle(path: str | Path, checkpoint: Checkpoint, *, layout: str, asked: Asked) -> Bundle:
    """Write a bundle with the weights of a file, every one of them accounted for; return it.

    A trunk alone is given a head with fresh weights, which the bundle says, and has to be trained.
    A network of one class, whose score is a sigmoid's, becomes one of two: softmax of 0 and the
    score is the same.

    Raises:
        BundleError: names that are missing, unknown, or of another shape; a network that is not
            built here; something asked that contradicts the file.
    """
    form = layout_named(layout)
    tensors = checkpoint.tensors
    architecture = _architecture(form, tensors, asked)
    names = form.modules(architecture, tensors)
    alone = _alone(names)
    sketch = _sketch(architecture, bands=len(form.bands), classes=2)
    scores = None if alone else _scores(sketch, form, tensors, names)
    classes, source = _classes(form, checkpoint, asked, scores=scores)
    sketch = _sketch(architecture, bands=len(form.bands), classes=scores or len(classes))
    weights = bring(form, tensors, network=sketch, architecture=architecture)
    if scores == 1:
        _with_background(weights, sketch)
    bands = asked.bands or form.bands
    if bands != form.bands:
        first = _first_convolution(sketch)
        weights[first] = filters_for(weights[first], known=form.bands, asked=bands)
    scaling = scaling_for(form.scaling(architecture), known=form.bands, asked=bands)
    said = {"layout": layout, "file": checkpoint.file, "sha256": checkpoint.sha256}
    said |= {"classes": source} | ({"note": form.note} if form.note else {})
    if alone:
        said["fresh"] = "the head: train it before use"
        weights = _fresh(architecture, bands=len(bands), classes=len(classes)) | weights
    bundle = Bundle(
        name=f"{layout}-{architecture.family}-{architecture.backbone}",
        version=1,
        architecture=architecture,
        classes=classes,
        ignore_index=255 if len(classes) <= 255 else 65535,
        input=InputSpec(bands=bands, dtype="uint8", scaling=scaling),
        crop=asked.crop or form.crop,
        training={"imported": said},
    )
    return save_bundle(path, bundle, weights)


def _architecture(form: Layout, tensors: Mapping[str, Tensor], asked: Asked) -> Architecture:
    made = form.architecture(tensors)
    if _alone(form.modules(made, tensors)):
        made = published(asked.family or "v3", made.backbone, output_stride=asked.output_stride)
    elif asked.family not in (None, made.family):
        raise BundleError(f"--family {asked.family} asked, the file holds a {made.family}")
    elif asked.output_stride is not None:
        made = form.at_stride(made, asked.output_stride)
    return made if asked.rates is None else replace(made, rates=asked.rates)


def _alone(names: Mapping[str, str]) -> bool:
    """Whether a layout names the modules of a trunk, and of no head."""
    return list(names) == ["backbone"]


def _sketch(architecture: Architecture, *, bands: int, classes: int) -> DeepLab:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build_network(architecture, bands=bands, classes=classes)


def _fresh(architecture: Architecture, *, bands: int, classes: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return build_network(architecture, bands=bands, classes=classes).state_dict()


def _scores(
    sketch: DeepLab, form: Layout, tensors: Mapping[str, Tensor], names: Mapping[str, str]
) -> int:
    """How many scores the last layer gives, by its bias."""
    last = sketch.last_layers[0]
    ours = next(name for name, module in sketch.named_modules() if module is last)
    theirs = their_name(ours, names)
    assert theirs is not None
    key = form.key(last, theirs, "bias")
    if key not in tensors:
        raise BundleError(f"the file misses {key}, which tells the number of classes")
    return len(tensors[key])


def _classes(
    form: Layout, checkpoint: Checkpoint, asked: Asked, *, scores: int | None
) -> tuple[tuple[ClassInfo, ...], str]:
    """The classes, and where their names come from; ``scores`` None: of a trunk alone."""
    count = 2 if scores == 1 else scores
    given = len(asked.classes) if isinstance(asked.classes, tuple) else asked.classes
    if given is None and count is None:
        raise BundleError("the file holds a trunk alone: give --classes for the head to train")
    if None not in (given, count) and given != count:
        raise BundleError(f"--classes gives {given} classes, the file's network has {count}")
    count = count or given
    assert count is not None
    said = form.classes(checkpoint.beside)
    if isinstance(asked.classes, tuple):
        return asked.classes, "as given"
    if said is not None and len(said) == count:
        return said, "as the file says"
    names, source = [f"class-{number}" for number in range(count)], "numbered"
    if form.named_by_count and scores in KNOWN_CLASSES:
        data, known = KNOWN_CLASSES[count]
        names, source = list(known), f"{data}, by their number"
    numbered = [ClassInfo.numbered(n, of=count, name=name) for n, name in enumerate(names)]
    return tuple(numbered), source


def _with_background(weights: dict[str, Tensor], sketch: DeepLab) -> None:
    """Put a class of score 0 before the one there is."""
    for last in sketch.last_layers:
        ours = next(name for name, module in sketch.named_modules() if module is last)
        for key in (f"{ours}.weight", f"{ours}.bias"):
            weights[key] = torch.cat([torch.zeros_like(weights[key]), weights[key]])


def _first_convolution(sketch: DeepLab) -> str:
    """Name of the weight that reads the image."""
    return next(
        f"{name}.weight"
        for name, module in sketch.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Conv3d))
    )
