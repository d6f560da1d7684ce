"""``terravox model``: bundles, and weights from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import BundleError, PipelineError
from workflows import cli_options as take
from workflows.telling import list_values, tell_values

model_app = typer.Typer(help="Model bundles.", no_args_is_help=True, rich_markup_mode=None)

SliceStride = Annotated[int | None, typer.Option(help="Of volumes, px along z between features.")]
SliceRatio = Annotated[
    float | None, typer.Option(help="Of volumes: distance of slices over that of pixels.")
]


@model_app.command("show")
def show(bundle: Path, as_json: take.Json = False) -> None:
    """Say what a bundle holds."""
    from workflows.model import describe

    values = describe(bundle)
    tell_values(values, as_json=as_json)


@model_app.command("probe")
def probe(bundle: Path, as_json: take.Json = False) -> None:
    """Say how far a network reaches: by arithmetic, and as NaN in its input shows it."""
    from workflows.model import probe_bundle

    values = probe_bundle(bundle)
    problem = values.pop("problem")
    if as_json:
        tell_values(values, as_json=True)
    else:
        list_values({key: value or "none" for key, value in values.items()})
    if problem:
        raise PipelineError(problem)


@model_app.command("new")
def new(
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the bundle.")],
    family: Annotated[str, typer.Option(help="v1 v2 v3 v3plus fcn segnet unet.")] = "v3",
    backbone: Annotated[str | None, typer.Option(help="The family's own if absent.")] = None,
    dims: int = 2,
    slice_ratio: SliceRatio = None,
    bands: int = 3,
    classes: int = 2,
    output_stride: Annotated[
        int | None, typer.Option(help="The backbone's finest if absent.")
    ] = None,
    multi_scale: Annotated[
        bool, typer.Option("--multi-scale", help="v1: its MSc. v2: maximum over three sizes.")
    ] = False,
    slice_stride: SliceStride = None,
    seed: int = 0,
    as_json: take.Json = False,
) -> None:
    """Write an untrained bundle: for tests, benchmarks, and trying out a machine."""
    asked = {k: v for k, v in locals().items() if k != "as_json"}
    from workflows.model import create

    create(**asked)
    _tell_written(output, as_json=as_json)


@model_app.command("import")
def import_(
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the bundle.")],
    layout: Annotated[
        str,
        typer.Option(
            help="torchvision kazuto vainf jfzhang smp mmseg tf medicalnet timm: whose names."
        ),
    ],
    file: Annotated[
        Path | None, typer.Argument(help="Weights: .pth, .safetensors; of tf, arrays in an .npz.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Instead of a file, what torchvision or timm fetches.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Of torchvision's --weights.")] = None,
    family: Annotated[
        str | None, typer.Option(help="Head for a trunk alone, such as v3plus.")
    ] = None,
    output_stride: Annotated[
        int | None, typer.Option(help="As trained; the layout's if absent.")
    ] = None,
    rates: Annotated[str | None, typer.Option(help="As trained at that stride: 6,12,18.")] = None,
    bands: Annotated[
        str | None, typer.Option(help="Bands in order, where they are others: red,green,blue,nir.")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="YAML file with a list classes; or a number."),
    ] = None,
    crop: Annotated[int | None, typer.Option(help="Side of the training crop, px.")] = None,
    slice_stride: SliceStride = None,
    slice_ratio: SliceRatio = None,
    as_json: take.Json = False,
) -> None:
    """Write a bundle with weights from elsewhere, every one of them accounted for."""
    from pipeline.models.imported import import_bundle
    from pipeline.models.layouts.checkpoint import read_checkpoint
    from workflows.model_import import asked_of, fetch

    asked = asked_of(
        family=family,
        output_stride=output_stride,
        rates=rates,
        bands=bands,
        classes=classes,
        crop=crop,
        slice_stride=slice_stride,
        slice_ratio=slice_ratio,
    )
    if weights is not None and file is None:
        path = fetch(layout, weights, backbone)
    elif file is not None and weights is None:
        path = file
    else:
        raise BundleError("give a file of weights, or --weights for some that are published")
    import_bundle(output, read_checkpoint(path), layout=layout, asked=asked)
    _tell_written(output, as_json=as_json)


def _tell_written(output: Path, *, as_json: bool) -> None:
    if as_json:
        from workflows.model import describe

        tell_values(describe(output), as_json=True)
    else:
        typer.echo(output)
