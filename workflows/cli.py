"""The command. Nothing heavy is imported before it is known what is asked."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import (
    BundleError,
    CrfError,
    LeaseHeldError,
    PipelineError,
    PlanError,
    RegionError,
    SourceError,
)
from workflows import cli_options as take
from workflows.crf_cli import crf_app, refine
from workflows.model_cli import model_app
from workflows.schedule_cli import schedule_app
from workflows.telling import (
    EXIT_INTERRUPTED,
    EXIT_PARTIAL,
    exit_code,
    tell_cases,
    tell_manifest,
    tell_values,
)

EXIT_FAILED, EXIT_USAGE, EXIT_HELD = 1, 2, 75
USAGE_ERRORS = (PlanError, BundleError, SourceError, CrfError, RegionError)

app = typer.Typer(
    name="terravox",
    help="Segment images larger than memory: rasters and volumes, without seams.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(model_app, name="model")
app.add_typer(schedule_app, name="schedule")
app.add_typer(crf_app, name="crf")


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show tracebacks (anywhere on the line).")] = False,
) -> None:
    level = logging.INFO if debug else logging.WARNING
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=level)


@app.command()
def segment(
    source: str,
    output: take.Output,
    model: take.Model,
    run_dir: take.RunDirectory = None,
    crf: take.Crf = "auto",
    tile: take.TileSide = None,
    halo: take.HaloAsked = "exact",
    context: take.Context = "window",
    average: take.Averaging = "none",
    output_stride: take.OutputStride = None,
    windows: take.Windows = "rows",
    backend: take.Runner = "ray",
    ray_address: take.Cluster = None,
    workers: take.Workers = None,
    device: take.Device = "auto",
    precision: take.Floats = "auto",
    memory_budget: take.Budget = None,
    any_resolution: take.Resolution = False,
    scores: take.Scores = "none",
    aoi: take.AreaOfInterest = None,
    volume: take.Volume = None,
    series: take.Series = None,
    fresh: take.Fresh = False,
    allow_failed: take.AllowFailed = 0,
    tracking_uri: take.Tracking = None,
    experiment: take.Experiment = "terravox",
    as_json: take.Json = False,
) -> None:
    """Segment one raster or volume; the same command again resumes."""
    asked = {k: v for k, v in locals().items() if k not in ("source", "output", "model", "as_json")}
    from workflows.config import options
    from workflows.interrupt import Interrupt
    from workflows.segmenting import segment as run

    with Interrupt() as stop:
        manifest = run(source, output, model=model, options=options(**asked), stop=stop)
    tell_manifest(manifest, as_json=as_json)
    raise typer.Exit(exit_code(manifest))


@app.command()
def batch(
    sources: Annotated[
        list[str], typer.Argument(help="Files, folders, globs, CSV lists (columns id, path).")
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", help="Directory; or a path with {id}, no suffix.")
    ],
    model: Annotated[
        list[Path], typer.Option(help="Bundle for rasters, for volumes, or (twice) both.")
    ],
    run_dir: Annotated[Path | None, typer.Option(help="State; DIR.run otherwise.")] = None,
    crf: take.Crf = "auto",
    tile: take.TileSide = None,
    halo: take.HaloAsked = "exact",
    context: take.Context = "window",
    average: take.Averaging = "none",
    output_stride: take.OutputStride = None,
    windows: take.Windows = "rows",
    backend: take.Runner = "ray",
    ray_address: take.Cluster = None,
    workers: take.Workers = None,
    device: take.Device = "auto",
    precision: take.Floats = "auto",
    memory_budget: take.Budget = None,
    any_resolution: take.Resolution = False,
    scores: take.Scores = "none",
    aoi: take.AreaOfInterest = None,
    volume: take.Volume = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do all cases again.")] = False,
    allow_failed: Annotated[int, typer.Option(help="Finish a case with up to N bad tiles.")] = 0,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow store; a SQLite file beside DIR; none.")
    ] = None,
    experiment: take.Experiment = "terravox",
    as_json: take.Json = False,
) -> None:
    """Segment many rasters and volumes; the same command again does what is missing or changed."""
    asked = dict(locals())
    for own in ("sources", "output", "model", "as_json"):
        del asked[own]
    from workflows.batching import batch as run
    from workflows.config import options
    from workflows.interrupt import Interrupt

    with Interrupt() as stop:
        result = run(sources, output, models=model, options=options(**asked), stop=stop)
    if not result["cases"]:
        raise SourceError(f"no raster or volume found in {', '.join(sources)}")
    tell_cases(result, as_json=as_json)
    raise typer.Exit({"done": 0, "partial": EXIT_PARTIAL}.get(result["status"], EXIT_INTERRUPTED))


app.command()(refine)


@app.command()
def plan(
    source: str,
    model: take.Model,
    crf: take.Crf = "auto",
    tile: take.TileSide = None,
    halo: take.HaloAsked = "exact",
    context: take.Context = "window",
    average: take.Averaging = "none",
    output_stride: take.OutputStride = None,
    windows: take.Windows = "rows",
    workers: take.Workers = None,
    device: take.Device = "auto",
    precision: take.Floats = "auto",
    memory_budget: take.Budget = None,
    any_resolution: take.Resolution = False,
    scores: take.Scores = "none",
    aoi: take.AreaOfInterest = None,
    volume: take.Volume = None,
    series: take.Series = None,
    as_json: take.Json = False,
) -> None:
    """Say what would run: halo, tiles, bytes, share of halo work; run nothing."""
    asked = {k: v for k, v in locals().items() if k not in ("source", "model", "as_json")}
    from workflows.config import options
    from workflows.segmenting import plan

    values = plan(source, model=model, options=options(**asked))
    if not as_json:
        values = {k: v for k, v in values.items() if k not in ("samples", "asked", "channels")}
    tell_values(values, as_json=as_json)


@app.command()
def status(run_dir: Path, as_json: take.Json = False) -> None:
    """Say how far a run is, and who works on it."""
    from workflows.standing import status

    values = status(run_dir)
    tell_values(values, as_json=as_json)


@app.command()
def certify(
    run_dir: Path,
    model: Annotated[Path | None, typer.Option(help="The bundle, where it has moved.")] = None,
    as_json: take.Json = False,
) -> None:
    """Measure the seams of a finished run again; exit 1 where it is not what it claims."""
    from workflows.certifying import certify as run

    values = run(run_dir, model=model)
    tell_values(values, as_json=as_json)
    raise typer.Exit(EXIT_FAILED if values["passed"] is False else 0)


@app.command()
def doctor(as_json: take.Json = False) -> None:
    """Say what this machine can do, and what is missing."""
    from workflows.doctor import examine

    tell_values(examine(), as_json=as_json)


@app.command()
def demo(
    which: Annotated[str, typer.Argument(help="raster, volume, or both.")] = "both",
    out: Annotated[Path, typer.Option(help="Directory for everything.")] = Path("demo-out"),
    size: Annotated[int, typer.Option(help="Side of the scene, px.")] = 4096,
    as_json: take.Json = False,
) -> None:
    """Run the main job on a generated scene and a real brain; no data, no network needed."""
    from workflows.demo.show import run_demo
    from workflows.interrupt import Interrupt

    with Interrupt() as stop:
        results = run_demo(which, out=out, size=size, stop=stop)
    if as_json:
        print(json.dumps(results))
    if stop():
        raise typer.Exit(EXIT_INTERRUPTED)


def main() -> None:
    """The console script: errors become one line and an exit code."""
    debug = "--debug" in sys.argv
    argv = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        code = app(["--debug", *argv] if debug else argv, standalone_mode=False)
    except Exception as error:  # noqa: BLE001  the last stop: whatever it is, one line
        sys.exit(_complain(error, debug=debug))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(code or 0)


def _complain(error: Exception, *, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    usage = getattr(error, "exit_code", None)  # what the argument parser raises
    if usage is not None and hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "terravox"
        text = " ".join(error.format_message().split())
        if text.startswith("Usage:"):  # nothing was asked: the whole help, as the parser wrote it
            print(error.format_message(), file=sys.stderr)
        else:
            print(f"terravox: {text.rstrip('.')}; see {command} --help", file=sys.stderr)
        return int(usage)
    if isinstance(error, PipelineError | OSError):
        print(f"terravox: {' '.join(str(error).split())}", file=sys.stderr)
    else:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"terravox: internal error, {text} (--debug shows where)", file=sys.stderr)
    if isinstance(error, LeaseHeldError):
        return EXIT_HELD
    return EXIT_USAGE if isinstance(error, USAGE_ERRORS) else EXIT_FAILED
