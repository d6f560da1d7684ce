"""A workflow file: what is segmented periodically, with which models, where to, and when.

Cron fields are read in the workflow's own time zone, and a tick is the instant it stands for, in
UTC. Where clocks go forward, a local time that does not exist is due when the gap ends (02:30 runs
at 03:00); where they go back, a local time that comes twice is two ticks an hour apart, of which
the second finds only what arrived in between.
"""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from croniter import croniter
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.errors import BundleError, PlanError
from pipeline.models.document import read_yaml
from workflows.config import SegmentOptions

FIELDS = re.compile(r"\{([^{}]*)\}")
RANDOM_CRON = re.compile(r"(^|[\s,])[hr](?![a-z])", re.IGNORECASE)
"""``H`` and ``R`` stand for random numbers: each reading of the file would have other ticks."""


class Workflow(BaseModel):
    """One workflow file, checked; paths are absolute."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    sources: tuple[str, ...] = Field(min_length=1)
    """Files, folders, globs, CSV lists."""
    models: tuple[str, ...] = Field(min_length=1)
    """Bundle directories, ``models:/name@alias``, ``models:/name/VERSION``."""
    output: str
    """Path with ``{id}``, and ``{tick:%Y-%m-%d}`` where a tick's outputs lie apart."""
    state: Path
    """What the workflow remembers: a directory on a local disk, shared with no other workflow."""
    cron: str
    """Minute, hour, day of month, month, day of week; 0 and 7 are Sunday."""
    timezone: str
    options: SegmentOptions = SegmentOptions()

    @field_validator("output")
    @classmethod
    def _output(cls, value: str) -> str:
        fields = FIELDS.findall(value)
        unknown = [f for f in fields if f != "id" and not f.startswith("tick:%")]
        if unknown or set("{}") & set(FIELDS.sub("", value)):
            found = f"{{{unknown[0]}}}" if unknown else "a brace alone"
            raise ValueError(f"takes {{id}} and {{tick:%Y-%m-%d}} only, found {found}")
        if "id" not in fields:
            raise ValueError("needs {id}, or every mask would have the same name")
        return value

    @field_validator("cron")
    @classmethod
    def _cron(cls, value: str) -> str:
        five = len(value.split()) == 5 and not RANDOM_CRON.search(value)
        if not five or not croniter.is_valid(value, strict=True):
            raise ValueError('must be five cron fields that some day meets, such as "0 4 * * mon"')
        return value

    @field_validator("timezone")
    @classmethod
    def _timezone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ValueError, OSError, KeyError) as error:  # absent, malformed, a folder of zones
            raise ValueError("must be a zone of this machine, such as Europe/Vienna") from error
        return value

    @field_validator("options", mode="before")
    @classmethod
    def _options(cls, value: Any) -> Any:
        own = [key for key in ("run_dir", "fresh") if isinstance(value, dict) and key in value]
        if own:
            raise ValueError(f"does not take {own[0]}: the workflow keeps its run in state")
        return value

    def last_tick(self, now: datetime) -> datetime:
        """The latest scheduled time at or before ``now``, in UTC; ``now`` is aware."""
        # croniter looks strictly before: from the next minute, this minute is found.
        minute = now.astimezone(UTC).replace(second=0, microsecond=0)
        found: datetime = self._from(minute + timedelta(minutes=1)).get_prev(datetime)
        return found.astimezone(UTC)

    def next_tick(self, after: datetime) -> datetime:
        """The first scheduled time after ``after``, in UTC; ``after`` is aware."""
        found: datetime = self._from(after).get_next(datetime)
        return found.astimezone(UTC)

    def output_at(self, tick: datetime) -> str:
        """The output pattern of ``tick``, in the workflow's time zone; ``{id}`` stays."""
        local = tick.astimezone(ZoneInfo(self.timezone))

        def filled(field: re.Match[str]) -> str:
            text = field[1]
            is_tick = text.startswith("tick:")  # a folder may have braces in its name
            return local.strftime(text.removeprefix("tick:")) if is_tick else field[0]

        return FIELDS.sub(filled, self.output)

    def _from(self, moment: datetime) -> Any:
        return croniter(self.cron, moment.astimezone(ZoneInfo(self.timezone)))


def read_workflow(path: str | Path) -> Workflow:
    """Read a workflow file; its relative paths begin at its folder. Raises PlanError, one line."""
    path = Path(path).absolute()
    try:
        document = read_yaml(path)
    except BundleError as error:
        raise PlanError(str(error)) from error
    if not isinstance(document, dict):
        raise PlanError(f"{path} is no workflow file: it must be a mapping of name, sources, ...")
    try:
        workflow = _anchored(Workflow.model_validate(document), path.parent)
    except ValidationError as error:
        raise PlanError(_refusal(path, error)) from error
    _check_apart(path, workflow)
    return workflow


def _check_apart(path: Path, workflow: Workflow) -> None:
    """Refuse sources that are walked and hold the masks of other ticks. Raises PlanError."""
    folder, marked, _ = workflow.output.partition("{tick:")
    masks = Path(os.path.normpath(folder + "x"))
    for source in workflow.sources:
        walked = source.partition("**")[0] if "**" in source else source
        inside = masks.is_relative_to(os.path.normpath(walked))
        if marked and inside:  # without ticks they are one folder, which a batch leaves out
            raise PlanError(
                f"{path}: output {workflow.output} lies inside {source} of sources: the masks of"
                " one tick would be the sources of the next; put them elsewhere"
            )


def _anchored(workflow: Workflow, folder: Path) -> Workflow:
    options = workflow.options
    if options.crf not in ("auto", "off"):
        options = options.model_copy(update={"crf": str(folder / options.crf)})
    if options.aoi is not None:
        options = options.model_copy(update={"aoi": folder / options.aoi})
    paths = {
        "sources": tuple(_under(folder, source) for source in workflow.sources),
        "models": tuple(_under(folder, model) for model in workflow.models),
        "output": _under(folder, workflow.output),
        "state": folder / workflow.state,
    }
    return workflow.model_copy(update={**paths, "options": options})


def _under(folder: Path, text: str) -> str:
    """``text`` seen from ``folder``, unless it is a URI."""
    return text if re.match(r"[A-Za-z][\w+.-]*:/", text) else str(folder / text)


def _refusal(path: Path, error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{path}: unknown key {key}; see terravox schedule --help"
    if first["type"] == "missing":
        return f"{path}: key {key} is missing"
    found = first.get("input")
    problem = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    # Bare off, on, yes and no are booleans in YAML: `crf: off` is the one that people meet.
    hint = "; write it in quotes" if isinstance(found, bool) else ""
    return f"{path}: {key} {problem}, got {found!r}{hint}"
