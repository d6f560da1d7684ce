"""``terravox refine`` and ``terravox crf``: what one may ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import PlanError
from workflows import cli_options as take
from workflows.telling import EXIT_INTERRUPTED, exit_code, tell_manifest, tell_values

crf_app = typer.Typer(help="The dense CRF.", no_args_is_help=True, rich_markup_mode=None)


def refine(
    source: Annotated[str, typer.Argument(help="The image that guides: a raster or a volume.")],
    scores: Annotated[
        Path,
        typer.Option(
            help="Probabilities: a band (4-D NIfTI: a volume) for each class; or the run directory"
            " of segment --scores."
        ),
    ],
    output: take.Output,
    crf: Annotated[Path, typer.Option(help="YAML file with a crf part; a bundle's is one.")],
    classes: Annotated[
        Path | None, typer.Option(help="YAML file with a list classes; else the scores' names.")
    ] = None,
    run_dir: take.RunDirectory = None,
    tile: take.TileSide = None,
    backend: take.Runner = "ray",
    ray_address: take.Cluster = None,
    workers: take.Workers = None,
    device: take.Device = "auto",
    memory_budget: take.Budget = None,
    volume: Annotated[
        int | None, typer.Option(help="Which volume of a 4-D scan guides; all otherwise.")
    ] = None,
    series: take.Series = None,
    fresh: take.Fresh = False,
    allow_failed: take.AllowFailed = 0,
    tracking_uri: take.Tracking = None,
    experiment: take.Experiment = "terravox",
    as_json: take.Json = False,
) -> None:
    """Dense CRF alone, on anybody's scores; the same command again resumes."""
    own = ("source", "scores", "output", "crf", "classes", "as_json")
    asked = {k: v for k, v in locals().items() if k not in ("own", *own)}
    from workflows.config import RefineOptions, checked
    from workflows.interrupt import Interrupt
    from workflows.refining import refine as run

    options = checked(RefineOptions, asked)
    with Interrupt() as stop:
        manifest = run(
            source, output, scores=scores, crf=crf, legend=classes, options=options, stop=stop
        )
    tell_manifest(manifest, as_json=as_json)
    raise typer.Exit(exit_code(manifest))


@crf_app.command("tune")
def tune(
    examples: Annotated[
        Path, typer.Argument(help="CSV list with the columns image, scores, reference.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The CRF file to write.")],
    crf: Annotated[
        Path, typer.Option(help="YAML file with a crf part: all but one kernel stays as it is.")
    ],
    classes: Annotated[
        Path | None, typer.Option(help="YAML file with a list classes; else ids from 0.")
    ] = None,
    grid: Annotated[str, typer.Option(help="First grid of a paper: v1 or v2.")] = "v2",
    weights: Annotated[str | None, typer.Option(help="Instead of the grid's: 3,4,5.")] = None,
    positions: Annotated[
        str | None, typer.Option(help="Deviations, in the CRF file's unit: 30,50,70.")
    ] = None,
    values: Annotated[str | None, typer.Option(help="Deviations of guide values: 3,6.")] = None,
    device: take.Device = "auto",
    into: Annotated[Path | None, typer.Option(help="A bundle that takes the best CRF.")] = None,
    tracking_uri: take.Tracking = None,
    experiment: take.Experiment = "terravox",
    as_json: take.Json = False,
) -> None:
    """Search weight and deviations of the appearance kernel, coarse to fine, by mean IoU."""
    from pipeline.crf.search import FIRST_GRIDS, SearchGrid
    from workflows.crf_tune import TuneOptions
    from workflows.crf_tune import tune as run
    from workflows.interrupt import Interrupt

    if grid not in FIRST_GRIDS:
        raise PlanError(f"--grid {grid} asked; there are: {', '.join(FIRST_GRIDS)}")
    first = FIRST_GRIDS[grid]
    chosen = SearchGrid(
        weight=first.weight if weights is None else _numbers(weights, option="--weights"),
        position=first.position if positions is None else _numbers(positions, option="--positions"),
        value=first.value if values is None else _numbers(values, option="--values"),
    )
    options = TuneOptions(
        grid=chosen,
        device=device,
        into=into,
        tracking=tracking_uri,
        experiment=experiment,
    )
    with Interrupt() as stop:
        result = run(examples, output, crf=crf, legend=classes, options=options, stop=stop)
    tell_values(result, as_json=as_json)
    raise typer.Exit(0 if result["status"] == "done" else EXIT_INTERRUPTED)


def _numbers(text: str, *, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise PlanError(f"{option} {text}: numbers with commas between are needed") from error
