"""Options that several commands take, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[Path, typer.Option(help="Model bundle: a directory with model.yaml.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, last, on stdout.")]
Crf = Annotated[str, typer.Option(help="auto (on if the bundle has a crf part), off, or a file.")]
TileSide = Annotated[int | None, typer.Option("--tile", help="Side of a tile, px.")]
HaloAsked = Annotated[
    str, typer.Option("--halo", help="exact, a number of px, or auto:1e-4 (measured).")
]
Context = Annotated[
    str,
    typer.Option(help="Image pooling over a window, the scene (two passes) or the tile (inexact)."),
]
Averaging = Annotated[
    str,
    typer.Option(help="none, or mirror images and sizes: flip:yx, scale:0.75,1,1.25+flip:x."),
]
OutputStride = Annotated[
    int | None, typer.Option(help="8 or 16 where the trunk has both; the bundle's own otherwise.")
]
Windows = Annotated[
    str,
    typer.Option(help="rows, or canonical: with --crf off, the same bytes for any tile."),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Floats = Annotated[str, typer.Option("--precision", help="auto, fp32 or bf16.")]
Budget = Annotated[
    str | None, typer.Option(help="Refuse a plan that takes more memory, such as 16GB.")
]
Resolution = Annotated[
    bool, typer.Option("--any-resolution", help="Accept a pixel size unlike the bundle's.")
]
Scores = Annotated[str, typer.Option(help="Keep probabilities: none, uint8 or float16.")]
AreaOfInterest = Annotated[
    Path | None,
    typer.Option("--aoi", help="Label only what lies in these polygons (a scan: in this mask)."),
]
Volume = Annotated[int | None, typer.Option(help="Which volume of a 4-D scan, from 0.")]
Series = Annotated[
    str | None, typer.Option(help="SeriesInstanceUID, where a DICOM folder holds several.")
]
Cluster = Annotated[
    str | None, typer.Option(help="auto or host:port: join a Ray cluster; else one starts here.")
]
Workers = Annotated[int | None, typer.Option(help="Number of actors.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="The mask to write.")]
RunDirectory = Annotated[Path | None, typer.Option(help="Run directory; OUT.run otherwise.")]
Runner = Annotated[str, typer.Option(help="ray, or serial (this process).")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over, replace the output.")]
AllowFailed = Annotated[int, typer.Option(help="Finish with up to N failed tiles.")]
Tracking = Annotated[str | None, typer.Option(help="MLflow store; a SQLite file beside OUT; none.")]
Experiment = Annotated[str, typer.Option(help="MLflow experiment.")]
