"""How results are told: JSON for programs on stdout, last; tables and lines for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

EXIT_PARTIAL, EXIT_INTERRUPTED = 3, 130


def tell_manifest(manifest: Mapping[str, Any], *, as_json: bool) -> None:
    """Classes and status, of one image."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    size = next((k for k in ("area_m2", "volume_ml") if k in manifest["classes"][0]), None)
    table = Table("id", "class", "pixels", *([size] if size else []))
    for row in manifest["classes"]:
        cells = [str(row["id"]), row["name"], f"{row['pixels']:,}"]
        table.add_row(*cells, *([f"{row[size]:,.1f}"] if size else []))
    if manifest["output"]:
        console.print(table)
    tiles = manifest["tiles"]
    skipped = f" ({tiles['skipped']} with nothing to label)" if tiles["skipped"] else ""
    console.print(
        f"{manifest['status']}: {tiles['done']} of {tiles['total']} tiles{skipped} in"
        f" {manifest['seconds']:.1f} s -> {manifest['output'] or 'no output yet; run it again'}"
    )
    if as_json:
        typer.echo(json.dumps(manifest))


def tell_cases(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Counts of a batch."""
    from rich.console import Console

    counts, folder = result["counts"], Path(result["output"])
    Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(
        f"{result['status']}: {counts['done']} of {counts['total']} cases done"
        f" ({counts['computed']} computed now),"
        f" {counts['failed']} failed, {counts['quarantined']} quarantined"
        f" in {result['seconds']:.1f} s -> {folder / 'cases.csv'}"
    )
    if as_json:
        typer.echo(json.dumps(result))


def exit_code(manifest: Mapping[str, Any]) -> int:
    """Of a command that made one output, or did not."""
    if manifest["status"] == "interrupted":
        return EXIT_INTERRUPTED
    return 0 if manifest["output"] else EXIT_PARTIAL


def tell_values(values: Mapping[str, Any], *, as_json: bool) -> None:
    """Values by name."""
    if as_json:
        typer.echo(json.dumps(values))
    else:
        list_values(values)


def list_values(values: Mapping[str, Any]) -> None:
    """A line for each value; sizes in GB."""
    for key, value in values.items():
        text = f"{value / 1e9:.2f} GB" if key.endswith("_bytes") else _plain(value)
        typer.echo(f"{key:22} {text}")


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return " ".join(_plain(v) for v in value)
    return str(value)
