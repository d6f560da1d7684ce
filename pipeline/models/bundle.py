"""A model on disk: a directory with ``model.yaml`` and its weights."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from pipeline.errors import BundleError
from pipeline.models.architecture import Architecture
from pipeline.models.custom_architecture import CustomArchitecture
from pipeline.models.document import from_document, read_yaml, to_document
from pipeline.models.input_spec import ClassInfo, InputSpec, Legend, Scaling

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.custom_network import CustomNetwork
    from pipeline.models.deeplab import DeepLab

__all__ = [
    "Architecture",
    "Bundle",
    "ClassInfo",
    "CustomArchitecture",
    "InputSpec",
    "Scaling",
    "load_bundle",
    "save_bundle",
]

MODEL_FILE, WEIGHTS_FILE, PROGRAM_FILE = "model.yaml", "weights.safetensors", "program.pt2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A network, what it was trained on, and what its classes are called."""

    name: str
    version: int
    architecture: Architecture | CustomArchitecture
    classes: tuple[ClassInfo, ...]

    ignore_index: int
    """Label that training left out; no class has it."""

    input: InputSpec

    crop: tuple[int, ...]
    """Training window, in pixels per axis; the window of image pooling."""

    crf: Mapping[str, Any] | None = None
    """Parameters of the dense CRF as the file has them; None: the bundle asks for none."""

    training: Mapping[str, Any] = field(default_factory=dict)
    """Where the weights come from: data digests, metrics."""

    weights_sha256: str = ""
    """SHA-256 of the file of weights, or of the program that holds them; empty until saved."""

    path: Path = Path()
    """The directory; not part of the file."""

    def __post_init__(self) -> None:
        if self.ignore_index in self.legend.values:
            raise BundleError(f"ignore_index {self.ignore_index} is the id of a class")
        dims = self.architecture.dims
        if len(self.crop) != dims or min(self.crop) < 1:
            raise BundleError(f"crop {list(self.crop)} must be {dims} positive numbers of px")
        spacing = self.input.spacing_mm
        if spacing is not None and len(spacing) != dims:
            raise BundleError(f"spacing_mm {list(spacing)} must be {dims} numbers")

    @property
    def legend(self) -> Legend:
        """The classes, as a mask has them."""
        return Legend(self.classes)

    @property
    def class_values(self) -> tuple[int, ...]:
        """Class id of each output channel."""
        return self.legend.values

    @property
    def weights_file(self) -> Path:
        """Where the weights are: by themselves, or in the program of a network that is one.

        Under the name of a draft where whoever saved them was killed before the last step.
        """
        return self._weights_draft if self._weights_draft.exists() else self._weights_place

    @property
    def _weights_place(self) -> Path:
        if isinstance(self.architecture, CustomArchitecture) and not self.architecture.entry_point:
            return self.path / PROGRAM_FILE
        return self.path / WEIGHTS_FILE

    @property
    def _weights_draft(self) -> Path:
        """A name that no other weights have."""
        place = self._weights_place
        return place.with_name(f".{self.weights_sha256[:16]}.{place.name}")

    @property
    def mask_dtype(self) -> Literal["uint8", "uint16"]:
        """The smallest type that holds the class ids and nodata."""
        return self.legend.dtype

    @property
    def mask_nodata(self) -> int:
        """Mask value where no pixel was valid: the greatest of the type."""
        return self.legend.nodata

    @property
    def digest(self) -> str:
        """SHA-256 of what the bundle says, weights included by their own SHA-256."""
        text = json.dumps(_document(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def at_stride(self, output_stride: int) -> Bundle:
        """The same weights at another output stride; a bundle of another digest.

        Raises BundleError where the architecture has no such stride.
        """
        if isinstance(self.architecture, CustomArchitecture):
            raise BundleError(f"{self.name}: the stride of a custom network is its own")
        return replace(self, architecture=self.architecture.at_stride(output_stride))

    def network(
        self, place: Callable[[Tensor], Tensor] = lambda weight: weight
    ) -> DeepLab | CustomNetwork:
        """The network with its weights, in eval mode, pooling over the crop.

        ``place`` brings a weight, given as float32 on the CPU, to where and how it is wanted.

        Raises:
            BundleError: the weights fail their checksum, do not fit the architecture, or are no
                finite numbers.
        """
        import torch

        self._check_weights()
        network = self._loaded(place)
        for weight in (*network.parameters(), *network.buffers()):  # those that no file has, too
            weight.data = place(weight.data)
        for name, weight in network.state_dict().items():
            if not torch.isfinite(weight).all():
                raise BundleError(
                    f"the weights of {self.path} hold NaN or infinity in {name}: every pixel would"
                    " get the first class; train or export them again"
                )
        return network.eval().pool_over(self.crop)

    def _loaded(self, place: Callable[[Tensor], Tensor]) -> DeepLab | CustomNetwork:
        import safetensors

        architecture, bands = self.architecture, self.input.band_count
        try:
            if isinstance(architecture, CustomArchitecture):
                from pipeline.models.custom_network import custom_network

                data = self.weights_file.read_bytes()
                return custom_network(architecture, data, bands=bands, classes=len(self.classes))
            from pipeline.models.deeplab import network_of_file

            return network_of_file(
                architecture,
                self.weights_file,
                bands=bands,
                classes=len(self.classes),
                place=place,
            )
        except (RuntimeError, safetensors.SafetensorError) as error:
            problem = " ".join(str(error).split())[:300]
            raise BundleError(f"the weights of {self.path} do not fit: {problem}") from error

    def _check_weights(self) -> None:
        path = self.weights_file
        try:
            found = _sha256(path)
        except OSError as error:
            raise BundleError(f"cannot read the weights {path}: {error}") from error
        if found != self.weights_sha256:
            raise BundleError(
                f"{path} has SHA-256 {found[:12]}.., {MODEL_FILE} says"
                f" {self.weights_sha256[:12]}..: changed or cut short, fetch the bundle again"
            )


def load_bundle(path: str | Path) -> Bundle:
    """Read a bundle's ``model.yaml``; the weights are read by ``Bundle.network``.

    Raises:
        BundleError: a missing file, bad YAML, an unknown or missing key, a value that cannot be.
    """
    path = Path(path)
    _check_file(path / MODEL_FILE)
    document = read_yaml(path / MODEL_FILE)
    try:
        bundle = replace(from_document(Bundle, document), path=path.absolute())
        if not bundle.weights_sha256:
            raise BundleError("key weights_sha256 is missing")
    except BundleError as error:
        raise BundleError(f"{path / MODEL_FILE}: {error}") from error
    _check_file(bundle.weights_file)
    return bundle


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise BundleError(f"{path.parent} is no model bundle: it has no file {path.name}")


def save_bundle(path: str | Path, bundle: Bundle, weights: Mapping[str, Tensor] | bytes) -> Bundle:
    """Write a bundle whole or not at all; return it as saved. Of one that is there, what is ours.

    Other files beside it stay. A kill at any moment leaves the bundle that was there, or this one.

    ``weights`` is a state dict, or the bytes of a file: of weights, or of a program as
    ``torch.export.save`` writes it.

    Raises:
        BundleError: something that is not a bundle lies at ``path``.
    """
    import safetensors.torch

    path = Path(path)
    if path.exists() and not (path / MODEL_FILE).is_file() and not _is_empty(path):
        raise BundleError(f"{path} exists and is no model bundle: choose another directory")
    if isinstance(weights, bytes):
        data = weights
    else:
        data = safetensors.torch.save({key: part.contiguous() for key, part in weights.items()})
    saved = replace(bundle, path=path, weights_sha256=hashlib.sha256(data).hexdigest())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        (fresh / saved._weights_place.name).write_bytes(data)
        text = yaml.safe_dump(_document(saved), sort_keys=False, allow_unicode=True)
        (fresh / MODEL_FILE).write_text(text, encoding="utf-8")
        if not path.exists() or _is_empty(path):
            fresh.rename(path)
        else:
            _replace_files(saved, fresh)
    # As the file says it: 30 given for 30.0 would be another digest.
    return load_bundle(path)


def _replace_files(saved: Bundle, fresh: Path) -> None:
    """Those of ``fresh`` in place of the ones that are there.

    Weights lie beside the old ones until ``model.yaml``, with one rename, names them.
    """
    with _alone(saved.path):
        _replace_in_turn(saved, fresh)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for others who save a bundle here."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some shares lock no directories
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace_in_turn(saved: Bundle, fresh: Path) -> None:
    place, draft = saved._weights_place, saved._weights_draft
    if not place.is_file() or _sha256(place) != saved.weights_sha256:
        (fresh / place.name).replace(draft)
    (fresh / MODEL_FILE).replace(saved.path / MODEL_FILE)
    if draft.exists():
        draft.replace(place)
    for name in (WEIGHTS_FILE, PROGRAM_FILE):
        for left in saved.path.glob(f".{'[0-9a-f]' * 16}.{name}"):  # by whoever was killed
            left.unlink()
        if name != place.name:
            (saved.path / name).unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _document(bundle: Bundle) -> dict[str, Any]:
    document: dict[str, Any] = to_document(bundle)
    del document["path"]
    return document


def _is_empty(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None
