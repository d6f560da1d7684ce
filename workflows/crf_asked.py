"""From ``--crf`` to the CRF that runs: the bundle's, a file's, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.crf.engine import EngineName
from pipeline.crf.params import CrfParams, ResolvedCrf
from pipeline.domain import ImageInfo, Shape
from pipeline.errors import BundleError, CrfError
from pipeline.models.bundle import Bundle
from pipeline.models.document import read_yaml


def resolve_crf(asked: str, bundle: Bundle, info: ImageInfo) -> ResolvedCrf | None:
    """The CRF on this image's grid, its engine as asked; None for none. Raises CrfError."""
    params = crf_params(asked, bundle)
    if params is None:
        return None
    bands = bundle.input.bands
    names = tuple(str(i + 1) for i in range(bands)) if isinstance(bands, int) else bands
    return params.resolve(info.spacing, unit=info.unit, channels=names)


def over_image(crf: ResolvedCrf, channels: Sequence[int]) -> ResolvedCrf:
    """The same over the image; ``channels``: index in it of each of the network's bands."""
    kernels = tuple(
        replace(kernel, channels=tuple(channels[band] for band in kernel.channels))
        for kernel in crf.kernels
    )
    return replace(crf, kernels=kernels)


def with_engine(
    crf: ResolvedCrf | None, engine: EngineName | None, *, shape: Shape, classes: int
) -> ResolvedCrf | None:
    """The same CRF, computed by that engine. Raises CrfError for what is beyond one of both."""
    if crf is None or engine is None:
        return None
    chosen = replace(crf, engine=engine)
    chosen.check_classes(classes)
    chosen.check_extent(shape)
    return chosen


def crf_params(asked: str, bundle: Bundle) -> CrfParams | None:
    """What is asked of the CRF beside a network, whatever the image; None for none.

    Raises CrfError.
    """
    if asked == "off" or (asked == "auto" and bundle.crf is None):
        return None
    return read_crf(Path(asked)) if asked != "auto" else CrfParams.from_mapping(bundle.crf or {})


def read_crf(path: Path) -> CrfParams:
    """The CRF of a YAML file. Raises CrfError."""
    return CrfParams.from_mapping(read_crf_part(path))


def read_crf_part(path: Path) -> Mapping[str, Any]:
    """The ``crf`` part of a YAML file, such as a bundle's, or all of it. Raises CrfError."""
    try:
        found = read_yaml(path)
    except BundleError as error:
        raise CrfError(f"--crf {path}: {error}; give a YAML file with a crf part") from error
    if isinstance(found, Mapping) and "crf" in found:
        found = found["crf"]
    if not isinstance(found, Mapping):
        raise CrfError(f"--crf {path}: a mapping of CRF parameters is needed, found {found!r}")
    return found
