"""Scores to refine: a file, or what ``segment --scores`` left in its run directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.uri import open_channels
from adapters.zarr_store import ZarrStore
from pipeline.errors import SourceError
from pipeline.models.input_spec import ClassInfo, Legend
from pipeline.ports import Source
from pipeline.stitching.given_scores import StoredScores
from workflows.case import Case
from workflows.run_dir import RunDir, read_json


def open_scores(path: Path, case: Case, *, scratch: Path | None) -> tuple[Source, Legend | None]:
    """The scores, and their classes where a run of ours says which they are.

    Raises SourceError.
    """
    run = RunDir(path)
    if not run.plan.exists():
        return open_channels(str(path), scratch=scratch), None
    return _of_run(run, case)


def _of_run(run: RunDir, case: Case) -> tuple[StoredScores, Legend]:
    manifest = read_json(run.manifest)
    if manifest is None or manifest["status"] != "done" or not run.scores.is_dir():
        raise SourceError(
            f"{run.path} holds no scores of a finished run; run `terravox segment` with --crf off"
            " --scores float16 to its end"
        )
    _check(run, manifest, case)
    rows = manifest["classes"]
    looks = (ClassInfo(id=row["id"], name=row["name"], color=row["color"]) for row in rows)
    store = ZarrStore(run.scores)
    info = replace(
        case.source.info,
        channels=tuple(row["name"] for row in rows),
        dtype=store.dtype.name,
        nodata=(None,) * len(rows),
        notes=(),
    )
    name = f"{manifest['fingerprint']} {store.dtype.name}"
    return StoredScores(store=store, info=info, name=name), Legend(tuple(looks))


def _check(run: RunDir, manifest: Mapping[str, Any], case: Case) -> None:
    if manifest["source"]["digest"] != case.digest:
        raise SourceError(
            f"{run.path} segmented {manifest['source']['uri']}, {case.path} is another image;"
            " give the image whose scores these are"
        )
    if manifest["crf"] is not None:
        raise SourceError(
            f"{run.path} refined its scores already; run `terravox segment` with --crf off"
        )
