"""``model import``: what is asked in words, and weights that a library publishes."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import torch
import torchvision

from pipeline.errors import BundleError
from pipeline.models.imported import Asked
from pipeline.models.input_spec import ClassInfo
from workflows.legend import read_classes

_TORCHVISION = MappingProxyType(
    {
        "resnet18": ("resnet18",),
        "resnet50": ("deeplabv3_resnet50", "resnet50"),
        "resnet101": ("deeplabv3_resnet101", "resnet101"),
        "vgg16": ("vgg16",),
        "mobilenetv3-large": ("deeplabv3_mobilenet_v3_large",),
    }
)
"""torchvision's networks that have weights, by our trunk; the last may be of a trunk alone."""


def asked_of(
    *,
    family: str | None,
    output_stride: int | None,
    rates: str | None,
    bands: str | None,
    classes: str | None,
    crop: int | None,
    slice_stride: int | None,
    slice_ratio: float | None,
) -> Asked:
    """The options of the command. Raises BundleError or PlanError."""
    try:
        dilations = tuple(int(part) for part in rates.split(",")) if rates else None
    except ValueError as error:
        raise BundleError(f"--rates {rates}: whole numbers with commas between") from error
    return Asked(
        family=family,
        output_stride=output_stride,
        rates=dilations,
        bands=_bands(bands) if bands else None,
        classes=_classes(classes) if classes else None,
        crop=crop,
        slice_stride=slice_stride,
        slice_ratio=slice_ratio,
    )


def _bands(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise BundleError(f"--bands {text}: names with commas between, none of them empty")
    return names


def _classes(text: str) -> int | tuple[ClassInfo, ...]:
    return int(text) if text.isdecimal() else read_classes(Path(text))


def fetch(layout: str, weights: str, backbone: str | None) -> Path:
    """The file of weights that torchvision or timm publishes, fetched now or before.

    Raises:
        BundleError: the layout has none to fetch, or there is no network: then it names the file
            to bring.
    """
    if layout == "torchvision":
        url = _torchvision_url(weights, backbone)
        name = url.rpartition("/")[2]
    elif layout == "timm":
        url = f"https://huggingface.co/timm/{weights}/resolve/main/model.safetensors"
        name = f"{weights}.safetensors"
    else:
        raise BundleError(f"--weights is for torchvision and timm; of {layout}, give a file")
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(url, path, layout=layout)
    return path


def _torchvision_url(weights: str, backbone: str | None) -> str:
    networks = _TORCHVISION.get(backbone or "")
    if networks is None:
        raise BundleError(
            f"--backbone {backbone} asked of torchvision's --weights; there are:"
            f" {', '.join(_TORCHVISION)}"
        )
    known = [entry for name in networks for entry in torchvision.models.get_model_weights(name)]
    for entry in known:
        if entry.name == weights:
            url: str = entry.url
            return url
    names = ", ".join(entry.name for entry in known)
    raise BundleError(f"--weights {weights} asked of torchvision's {backbone}; there are: {names}")


def _download(url: str, path: Path, *, layout: str) -> None:
    stem, _, digest = path.stem.rpartition("-")
    try:
        torch.hub.download_url_to_file(
            url,
            str(path),
            hash_prefix=digest if stem and layout == "torchvision" else None,
            progress=False,
        )
    except (OSError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:120]
        raise BundleError(
            f"cannot fetch {url} ({problem}): where there is a network, fetch it by hand, and give"
            f" the file: terravox model import {path.name} --layout {layout} -o DIR"
        ) from error
