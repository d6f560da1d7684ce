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
from pipeline.models.layouts.resnet_keys import size_of
from pipeline.models.published import published


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a file of weights does not say. None: as in the layout's published files."""

    family: str | None = None
    """The head that a trunk alone is given, such as ``v3plus``."""

    output_stride: int | None = None
    """Pixels between features, as the weights were trained."""

    rates: tuple[int, ...] | None = None
    """Dilations of ASPP at that stride."""

    bands: tuple[str, ...] | None = None
    """Names and order of the bands, where they are not those of the weights."""

    classes: int | tuple[ClassInfo, ...] | None = None
    """Names, or the number alone, which only a trunk alone needs."""

    crop: int | None = None
    """Side of the training window in px; image pooling is over such windows."""

    slice_stride: int | None = None
    slice_ratio: float | None = None
    """Of volumes with thick slices, as in ``Architecture``; the weights are the same."""


def import_bundle(path: str | Path, checkpoint: Checkpoint, *, layout: str, asked: Asked) -> Bundle:
    """Write a bundle with the weights of a file, every one of them accounted for; return it.

    A trunk alone is given a head with fresh weights, which the bundle says, and has to be trained.
    A network of one class, whose score is a sigmoid's, becomes one of two: softmax of 0 and the
    score is the same.

    Raises:
        BundleError: names that are missing, unknown, or of another shape; a network that is not
            built here; something asked that contradicts the file.
    """
    form, tensors = layout_named(layout), checkpoint.tensors
    architecture = _architecture(form, tensors, asked)
    alone = _alone(form.modules(architecture, tensors))
    scores = None if alone else _scores(form, tensors, architecture)
    classes, source = _classes(form, checkpoint, asked, scores=scores)
    bands = asked.bands or form.bands
    weights = _weights(form, tensors, architecture, bands=bands, scores=scores or len(classes))
    said = {"layout": layout, "file": checkpoint.file, "sha256": checkpoint.sha256}
    said |= {"classes": source} | ({"note": form.note} if form.note else {})
    if alone:
        said["fresh"] = "the head: train it before use"
        fresh = _fresh_head(architecture, classes=len(classes))
        weights |= {**fresh, **form.begun(fresh, tensors)}
    scaling = scaling_for(form.scaling(architecture), known=form.bands, asked=bands)
    bundle = Bundle(
        name=f"{layout}-{architecture.family}-{architecture.backbone}",
        version=1,
        architecture=architecture,
        classes=classes,
        ignore_index=255 if len(classes) <= 255 else 65535,
        input=InputSpec(bands=bands, dtype=form.dtype, scaling=scaling),
        crop=(asked.crop,) * architecture.dims if asked.crop is not None else form.crop,
        training={"imported": said},
    )
    return save_bundle(path, bundle, weights)


def _architecture(form: Layout, tensors: Mapping[str, Tensor], asked: Asked) -> Architecture:
    """What the file holds, as it was trained."""
    made = form.architecture(tensors)
    if _alone(form.modules(made, tensors)):
        family, stride = asked.family or made.family, asked.output_stride
        made = published(family, made.backbone, dims=made.dims, output_stride=stride)
    elif asked.family not in (None, made.family):
        raise BundleError(f"--family {asked.family} asked, the file holds a {made.family}")
    elif asked.output_stride is not None:
        made = form.at_stride(made, asked.output_stride)
    names = ("rates", "slice_stride", "slice_ratio")
    given = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    return replace(made, **given)


def _alone(names: Mapping[str, str]) -> bool:
    """Whether a layout names the modules of a trunk, and of no head."""
    return list(names) == ["backbone"]


def _sketch(architecture: Architecture, *, bands: int, classes: int) -> DeepLab:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build_network(architecture, bands=bands, classes=classes)


def _fresh_head(architecture: Architecture, *, classes: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        network = build_network(architecture, bands=1, classes=classes)
    return {k: w for k, w in network.state_dict().items() if not k.startswith("backbone.")}


def _scores(form: Layout, tensors: Mapping[str, Tensor], architecture: Architecture) -> int:
    """How many scores the last layer gives, by its bias."""
    sketch = _sketch(architecture, bands=len(form.bands), classes=2)
    last = sketch.last_layers[0]
    theirs = their_name(_name(last, sketch), form.modules(architecture, tensors))
    assert theirs is not None
    return size_of(tensors, form.key(last, theirs, "bias"))


def _weights(
    form: Layout,
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    *,
    bands: tuple[str, ...],
    scores: int,
) -> dict[str, Tensor]:
    """What the file holds for our network, of the bands asked, and at least two classes."""
    sketch = _sketch(architecture, bands=len(form.bands), classes=scores)
    weights = bring(form, tensors, network=sketch, architecture=architecture)
    if scores == 1:
        for last in sketch.last_layers:
            for key in (f"{_name(last, sketch)}.weight", f"{_name(last, sketch)}.bias"):
                weights[key] = torch.cat([torch.zeros_like(weights[key]), weights[key]])
    if bands != form.bands:
        convolutions = (m for m in sketch.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
        first = f"{_name(next(convolutions), sketch)}.weight"
        weights[first] = filters_for(weights[first], known=form.bands, asked=bands)
    return weights


def _name(part: nn.Module, network: nn.Module) -> str:
    names: dict[nn.Module, str] = {module: name for name, module in network.named_modules()}
    return names[part]


def _classes(
    form: Layout, checkpoint: Checkpoint, asked: Asked, *, scores: int | None
) -> tuple[tuple[ClassInfo, ...], str]:
    """The classes, and where their names come from; ``scores`` None: of a trunk alone."""
    count = 2 if scores == 1 else scores
    given = len(asked.classes) if isinstance(asked.classes, tuple) else asked.classes
    if given is None and count is None:
        raise BundleError("the file holds a trunk alone: give --classes for the head to train")
    if count is None and given is not None and given < 2:
        raise BundleError(f"--classes gives {given} classes: a head has at least two")
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
