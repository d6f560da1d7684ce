"""``terravox schedule``: what one may ask for, and how it is told."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import PlanError
from workflows import cli_options as take

EXIT_CODES = {"done": 0, "superseded": 0, "partial": 3, "interrupted": 130}

schedule_app = typer.Typer(
    help="Periodic jobs, from workflow files.", no_args_is_help=True, rich_markup_mode=None
)


@schedule_app.command("tick")
def tick(
    workflow: Annotated[Path, typer.Argument(help="Workflow file.")],
    at: Annotated[
        str | None, typer.Option(help="ISO time with an offset; the present otherwise.")
    ] = None,
    as_json: take.Json = False,
) -> None:
    """Run the last scheduled time, unless it is done: for cron, Kubernetes, Airflow."""
    from workflows.interrupt import Interrupt
    from workflows.schedule import sentence
    from workflows.schedule import tick as run_tick

    with Interrupt() as stop:
        told = run_tick(workflow, now=None if at is None else _moment(at), stop=stop)
    typer.echo(json.dumps(told) if as_json else sentence(told), err=not as_json)
    raise typer.Exit(EXIT_CODES[told["status"]])


@schedule_app.command("run")
def run(
    workflows: Annotated[list[Path], typer.Argument(help="Workflow files.")],
) -> None:
    """Stay, and run workflows at their times; first what was missed, once."""
    from workflows.interrupt import Interrupt
    from workflows.scheduler import run as run_workflows

    with Interrupt() as stop:
        interrupted = run_workflows(workflows, stop=stop)
    raise typer.Exit(130 if interrupted else 0)


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
        later = moment.tzinfo is not None and moment > datetime.now(UTC)
    except (ValueError, OverflowError) as error:
        raise PlanError(f"--at {text} is no ISO time, such as 2026-10-25T02:30+02:00") from error
    if later:
        raise PlanError(f"--at {text} is still to come: its tick runs then")
    return moment
