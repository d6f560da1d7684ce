"""Somebody's file of weights, read without running anything that it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import BundleError

_WRAPPERS = ("state_dict", "model_state", "model_state_dict", "model")
"""Keys that training loops keep a state dict under, beside optimizer and counters."""

_OUTER = ("module.", "model.")
"""What ``DataParallel`` puts before every name, and Lightning does for a network so called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Weights by the names that their writer gave them."""

    tensors: Mapping[str, Tensor]

    beside: Mapping[str, Any]
    """What else the file said; empty for formats that hold tensors alone."""

    file: str
    """Name of the file, without its directory."""

    sha256: str


def read_checkpoint(path: Path) -> Checkpoint:
    """Read ``.safetensors``, ``.npz`` of named arrays, or what ``torch.save`` wrote.

    Raises:
        BundleError: no such file, or it holds more than tensors, numbers and text.
    """
    index = path.parent / f"{path.name}.index"
    if path.suffix in (".index", ".meta", ".pb") or ".data-" in path.name or index.exists():
        raise BundleError(
            f"{path} is TensorFlow's own: where that is installed, write the arrays of"
            " tf.train.load_checkpoint by their names with numpy.savez, and give the .npz"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read the weights {path}: {error}") from error
    try:
        held = _held(path)
    except Exception as error:  # what a reader of bytes raises on others is anything
        raise BundleError(
            f"{path} holds no weights, or more than weights, numbers and text, which is not run:"
            f" {_problem(error)}"
        ) from error
    tensors, beside = _unwrapped(held, path)
    digest = hashlib.sha256(data).hexdigest()
    return Checkpoint(tensors=tensors, beside=beside, file=path.name, sha256=digest)


def _held(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}
    with torch.serialization.safe_globals(_numbers()):
        return torch.load(path, map_location="cpu", weights_only=True)


def _numbers() -> list[Any]:
    """What a score that numpy computed needs to be read: training loops save their best one."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [np.dtype, *(type(np.dtype(name)) for name in ("f8", "f4", "i8"))]
    return [*kinds, scalar, (scalar, "numpy.core.multiarray.scalar")]


def _unwrapped(held: Any, path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The state dict within what a file held, and what lay beside it."""
    beside: Mapping[str, Any] = {}
    inner = next((key for key in _WRAPPERS if isinstance(_get(held, key), Mapping)), None)
    if inner is not None:
        beside = {key: value for key, value in held.items() if key != inner}
        held = held[inner]
    if not isinstance(held, Mapping) or not held:
        raise BundleError(f"{path} holds no state dict, but a {type(held).__name__}")
    strange = [str(key) for key, value in held.items() if not isinstance(value, Tensor)]
    if strange:
        raise BundleError(f"{path} holds no state dict: {strange[0]} is no tensor")
    outer = next((p for p in _OUTER if all(key.startswith(p) for key in held)), "")
    return {key.removeprefix(outer): weight for key, weight in held.items()}, beside


def _get(held: Any, key: str) -> Any:
    return held.get(key) if isinstance(held, Mapping) else None


def _problem(error: Exception) -> str:
    """What went wrong, without the advice to run the file all the same."""
    text = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
    for advice in (" was not an allowed global", " If you trust"):
        text = text.partition(advice)[0]
    return text[:150] or type(error).__name__
