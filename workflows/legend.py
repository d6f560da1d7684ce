"""The classes of somebody's scores: from a file, or from the names of the bands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import PlanError
from pipeline.models.document import from_document, read_yaml
from pipeline.models.input_spec import ClassInfo, Legend


def read_legend(path: Path | None, channels: tuple[str, ...]) -> Legend:
    """The classes in the order of the scores' bands. Raises BundleError or PlanError."""
    if path is None:
        count = len(channels)
        return Legend(
            tuple(
                ClassInfo.numbered(n, of=count, name=f"class-{n}" if name == str(n + 1) else name)
                for n, name in enumerate(channels)
            )
        )
    classes = read_classes(path)
    if len(classes) != len(channels):
        raise PlanError(
            f"--classes {path}: a list of {len(channels)} classes (id, name, color) is needed, one"
            f" for each band of the scores, in their order; found {len(classes)}"
        )
    return Legend(classes)


def read_classes(path: Path) -> tuple[ClassInfo, ...]:
    """The classes that a file lists. Raises BundleError or PlanError."""
    document = read_yaml(path)
    listed = document.get("classes") if isinstance(document, Mapping) else document
    if not isinstance(listed, list):
        raise PlanError(
            f"--classes {path}: a list of classes (id, name, color) is needed; found {listed!r}"
        )
    return tuple(from_document(ClassInfo, row, at=f"classes[{n}]") for n, row in enumerate(listed))
