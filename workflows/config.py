"""What a user may ask for, checked. Only this package reads arguments, environment and files."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator

from pipeline.errors import PlanError

Options = TypeVar("Options", bound="RunOptions")


class RunOptions(BaseModel):
    """Options of whatever runs over the tiles of one image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_dir: Path | None = None
    tile: int | None = Field(default=None, ge=1)
    backend: Literal["ray", "serial"] = "ray"
    workers: int | None = Field(default=None, ge=1)
    memory_budget: ByteSize | None = None
    """Of driver and workers together; a plan that takes more is refused."""
    volume: int | None = Field(default=None, ge=0)
    series: str | None = None
    """SeriesInstanceUID, for a DICOM folder that holds several."""
    ray_address: str | None = None
    """``auto`` or host:port joins a cluster; None starts one here, unless RAY_ADDRESS is set."""
    fresh: bool = False
    allow_failed: int = Field(default=0, ge=0)
    tracking_uri: str | None = None
    experiment: str = "terravox"


class SegmentOptions(RunOptions):
    """Options of ``terravox segment``; the contract names them, each once."""

    crf: str = "auto"
    """auto, off, or a YAML file that holds a ``crf`` part."""
    halo: str = "exact"
    """exact, a number of pixels, or auto:TOL, the share of labels that may differ."""
    context: Literal["window", "scene", "tile"] = "window"
    average: str = "none"
    """What probabilities are averaged over: none, flip:AXES, scale:FACTORS, or both with ``+``."""
    output_stride: int | None = Field(default=None, ge=1)
    """Pixels between features, other than those the bundle says; the weights stay the same."""
    windows: Literal["rows", "canonical"] = "rows"
    """What is computed at once: rows of the tile, or windows of the scene, whatever the tile."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    any_resolution: bool = False
    aoi: Path | None = None
    """Polygons, or for a volume a mask, outside of which nothing gets a label."""
    scores: Literal["none", "uint8", "float16"] = "none"

    @field_validator("halo")
    @classmethod
    def _halo(cls, value: str) -> str:
        if value != "exact" and not value.isdecimal() and _tolerance(value) is None:
            raise ValueError("must be 'exact', a number of pixels, or 'auto:TOL' such as auto:1e-4")
        return value

    @field_validator("average")
    @classmethod
    def _average(cls, value: str) -> str:
        flip, scale = r"flip:[zyx]+", r"scale:\d+(\.\d+)?(,\d+(\.\d+)?)*"
        if not re.fullmatch(rf"none|{flip}(\+{scale})?|{scale}(\+{flip})?", value):
            raise ValueError("must be 'none', flip:yx, scale:0.75,1,1.25, or scale:0.5,1+flip:x")
        return value

    @property
    def halo_tolerance(self) -> float | None:
        """Of ``auto:TOL``; None where the halo is asked for otherwise."""
        return _tolerance(self.halo)

    def request(self) -> dict[str, object]:
        """The options that decide the bytes of the result, as asked (``auto`` stays ``auto``).

        Of ``aoi`` not the path decides, but what lies there.
        """
        return self.model_dump(
            include={
                "crf", "tile", "halo", "context", "average", "output_stride", "windows", "device",
                "precision", "memory_budget",
                "any_resolution", "scores", "volume", "series",
            }
        )  # fmt: skip


def _tolerance(halo: str) -> float | None:
    name, _, text = halo.partition(":")
    try:
        value = float(text)
    except ValueError:
        return None
    return value if name == "auto" and 0 < value < 1 else None


class RefineOptions(RunOptions):
    """Options of ``terravox refine``."""

    device: Literal["auto", "cpu", "cuda"] = "auto"


def options(**asked: object) -> SegmentOptions:
    """Checked options of ``segment``. Raises PlanError, one line, for a value that cannot be."""
    return checked(SegmentOptions, asked)


def checked(kind: type[Options], asked: Mapping[str, object]) -> Options:
    """Checked options of that kind. Raises PlanError, one line, for a value that cannot be."""
    try:
        return kind.model_validate(asked)
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + "-".join(str(part) for part in first["loc"]).replace("_", "-")
        asked_for = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        raise PlanError(f"{name} {asked_for}, got {first.get('input')!r}") from error


def ray_address(asked: str | None = None) -> str:
    """Where Ray runs: a cluster that ``asked`` or ``RAY_ADDRESS`` names, else one started here.

    Settles authentication as well, and must come before the first import of Ray, which reads it
    then: left alone, it depends on leftovers in the home directory.
    """
    address = asked or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Else a process for every core is started, and those that no actor moves into stay.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    if address == "local":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    return address


def tracking_uri(asked: str | None, *, beside: Path) -> str:
    """``--tracking-uri``, else ``MLFLOW_TRACKING_URI``, else a SQLite file beside the output."""
    found = asked or os.environ.get("MLFLOW_TRACKING_URI")
    return found or f"sqlite:///{beside.resolve() / 'mlflow.db'}"
