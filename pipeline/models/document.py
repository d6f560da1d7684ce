"""Frozen values from YAML documents and back; strict about keys and types."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from pipeline.errors import BundleError

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice: YAML would take the last one in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value} is there twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


def read_yaml(path: Path) -> Any:
    """Parse one YAML document. Raises BundleError with one line."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"cannot read {path}: {error}") from error
    except RecursionError as error:
        raise BundleError(f"{path} is nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise BundleError(f"{path} is not valid YAML{place}: {problem}") from error


def from_document(kind: type[T], value: Any, *, at: str = "") -> T:
    """Build the dataclass ``kind`` from a parsed mapping, key for field.

    Raises:
        BundleError: names the place (``at`` and the keys below it), what was wanted and found.
    """
    if not isinstance(value, Mapping):
        raise BundleError(f"{at or 'the document'} must be a mapping, got {value!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    prefix = f"{at}." if at else ""
    unknown = [str(key) for key in value if key not in fields]
    if unknown:
        raise BundleError(
            f"unknown key {prefix}{unknown[0]}; {at or 'the document'} takes: {', '.join(fields)}"
        )
    hints = typing.get_type_hints(kind)
    return kind(
        **{
            name: _convert(hints[name], value[name], at=prefix + name)
            for name, field in fields.items()
            if name in value or _required(field, at=prefix + name)
        }
    )


def to_document(value: Any) -> Any:
    """The mapping that ``from_document`` would build an equal value from.

    Defaults are left out, so that a new field that has one changes no digest.
    """
    if dataclasses.is_dataclass(value):
        parts = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        said = [(f.name, part) for f, part in parts if part != f.default]
        return {name: to_document(part) for name, part in said}
    if isinstance(value, Mapping):
        return {key: to_document(part) for key, part in value.items()}
    return [to_document(part) for part in value] if isinstance(value, (tuple, list)) else value


def _required(field: dataclasses.Field[Any], *, at: str) -> bool:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        raise BundleError(f"key {at} is missing")
    return False


def _convert(hint: Any, value: Any, *, at: str) -> Any:
    """``value`` as the annotation ``hint`` has it; exact but for int as float."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(typing.get_args(hint), value, at=at)
    if origin is typing.Literal:
        if value in typing.get_args(hint):
            return value
        raise BundleError(f"{at} must be one of {', '.join(typing.get_args(hint))}, got {value!r}")
    if origin is tuple:
        return _convert_tuple(typing.get_args(hint)[0], value, at=at)
    if dataclasses.is_dataclass(hint):
        return from_document(typing.cast(type, hint), value, at=at)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint:
        return value
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return _plain(value, at=at)
    name = getattr(hint, "__name__", str(hint))
    raise BundleError(f"{at} must be of type {name}, got {value!r}")


def _convert_union(kinds: tuple[Any, ...], value: Any, *, at: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if type(value) in kinds:
        return value
    return _convert(next((k for k in kinds if _names(k, value)), kinds[0]), value, at=at)


def _names(kind: Any, value: Any) -> bool:
    """Whether a mapping has a word that a field of ``kind`` must have (``Literal``)."""
    hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
    words = {n: typing.get_args(h) for n, h in hints.items() if typing.get_origin(h) is Literal}
    return isinstance(value, Mapping) and any(value.get(n) in known for n, known in words.items())


def _convert_tuple(kind: Any, value: Any, *, at: str) -> tuple[Any, ...]:
    if kind is float and type(value) in (int, float):
        return (float(value),)  # one number stands for all bands
    if not isinstance(value, (list, tuple)):
        raise BundleError(f"{at} must be a list, got {value!r}")
    return tuple(_convert(kind, part, at=f"{at}[{n}]") for n, part in enumerate(value))


def _plain(value: Mapping[Any, Any], *, at: str) -> Mapping[str, Any]:
    """A mapping of text to what JSON knows, so that its digest is the same everywhere."""
    try:
        plain: Mapping[str, Any] = json.loads(json.dumps(value))
    except TypeError as error:
        raise BundleError(f"{at} holds a value that is not plain data: {error}") from error
    return plain
