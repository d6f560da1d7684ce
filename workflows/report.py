"""``report.html``: what a run made and how, on one page that needs no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.ports import Record

STAGES = {"read": "#4c78a8", "compute": "#f58518", "refine": "#b279a2", "write": "#54a24b"}
"""The stages of a tile, in order, and their colours."""

SEAM_ROWS = {
    "windows": ("windows", "{:,}"),
    "pixels": ("pixels", "{:,}"),
    "max_abs_logit": ("logits apart, at most", "{:.2g}"),
    "max_deviations": ("in deviations of the logits", "{:.2g}"),
    "label_disagreement": ("labels that differ", "{:.3%}"),
    "label_disagreement_upper_95": ("less than, with 95 %", "{:.3%}"),
    "label_disagreement_before_crf": ("labels that differ before the CRF", "{:.3%}"),
    "label_disagreement_before_crf_upper_95": ("less than, with 95 %", "{:.3%}"),
}
"""Keys of the manifest's ``seam``, what they are called, and how they are written."""
WAITED_FOR = {
    "read": "the reader",
    "compute": "the device",
    "refine": "labels and CRF",
    "write": "the writer",
    "model": "the model to load",
    "tile": "a tile to be handed out",
}
"""What a stage can wait for, in words."""

PROVENANCE = ("uri", "digest", "shape", "selection", "crs", "affine")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #f6f7f9; margin: 0 }
main { max-width: 1180px; margin: 0 auto; padding: 24px }
h1 { font-size: 24px; margin: 0 }
h2 { font-size: 17px; margin: 28px 0 8px }
.lead { color: #5b6876; margin: 2px 0 0 }
.badge { font-size: 13px; padding: 2px 10px; border-radius: 10px; color: #fff; background: #2f855a }
.badge.partial, .badge.interrupted { background: #b7791f }
.badge.failed { background: #c53030 }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 14px }
.pictures.wide { grid-template-columns: 1fr }
.pictures.pairs { grid-template-columns: 1fr 1fr; margin-top: 14px }
figure { margin: 0; background: #fff; border: 1px solid #dde2e8; border-radius: 6px; padding: 10px }
figure img { width: 100%; display: block; image-rendering: pixelated; background: #d5d9de }
figcaption { color: #5b6876; font-size: 13px; padding-top: 6px }
table { border-collapse: collapse; background: #fff; border: 1px solid #dde2e8 }
th, td { padding: 5px 12px; text-align: left; vertical-align: top }
th, td { border-bottom: 1px solid #edf0f3 }
td { overflow-wrap: anywhere }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.swatch { display: inline-block; width: 13px; height: 13px; border: 1px solid #0003;
  border-radius: 3px; margin-right: 8px; vertical-align: -2px }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 0 24px }
.columns table { width: 100% }
ul { margin: 0; padding-left: 20px }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>{body}</main>
</body>
</html>
"""

LONG_TEXT = 160
"""Characters from which a value, such as a CRS, is folded away."""


def write_report(
    path: Path,
    *,
    manifest: Mapping[str, Any],
    pictures: Mapping[str, Image.Image],
    seams: Mapping[str, Image.Image],
    records: Sequence[Record],
) -> None:
    """Write the page; equal arguments give equal bytes.

    Args:
        path: the HTML file, replaced whole.
        manifest: as the command's contract names its keys; what is absent is left out.
        pictures: by caption, embedded as PNG.
        seams: likewise, of the seam certificate.
        records: the ledger's, one per tile; their stages' seconds are summed up.
    """
    name = Path(str(manifest.get("output") or "no output")).name
    body = f"""
{_heading(name, manifest)}
{_notes(manifest)}
{_result(pictures)}
<div class="columns">
<section>{_classes(manifest)}</section>
<section>{_timings(records)}{_waits(manifest.get("stages", {}))}</section>
</div>
{_seam(manifest.get("seam"), seams)}
<div class="columns">
<section><h2>Plan</h2>{_table(_plan(manifest))}</section>
<section><h2>Provenance</h2>{_table(_provenance(manifest))}</section>
</div>
"""
    draft = path.with_name(f".partial-{path.name}")
    try:
        draft.write_text(PAGE.format(title=_text(name), style=STYLE, body=body), encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _text(value: Any) -> str:
    """Any value for a reader, escaped; the one way from a value into the page."""
    if isinstance(value, Mapping):
        return ", ".join(f"{_text(k)} {_text(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return escape(str(value))


def _heading(name: str, manifest: Mapping[str, Any]) -> str:
    status, model = str(manifest.get("status", "")), manifest.get("model", {})
    tiles, seconds = manifest.get("tiles", {}), manifest.get("seconds", 0.0)
    failed = f", {tiles['failed']} failed" if tiles.get("failed") else ""
    return (
        f'<h1>{_text(name)} <span class="badge {_text(status)}">{_text(status)}</span></h1>'
        f'<p class="lead">{_text(model.get("name", ""))} {_text(model.get("version", ""))}'
        f" &middot; {_text(tiles.get('done', 0))} of {_text(tiles.get('total', 0))} tiles"
        f"{_text(failed)} &middot; {seconds:.1f} s"
        f" &middot; {_text(manifest.get('throughput', ''))}</p>"
    )


def _notes(manifest: Mapping[str, Any]) -> str:
    notes = [_text(note) for note in manifest.get("notes", ())]
    notes += [
        f"tile {_text(failure['tile'])} failed: {_text(failure['error'])}"
        for failure in manifest.get("failed_tiles", ())
    ]
    if not notes:
        return ""
    return "<h2>Notes</h2><ul>" + "".join(f"<li>{note}</li>" for note in notes) + "</ul>"


def _result(pictures: Mapping[str, Image.Image]) -> str:
    wide = any(picture.width > 2 * picture.height for picture in pictures.values())
    return f"<h2>Result</h2>{_pictures(pictures, layout='wide' if wide else '')}"


def _pictures(pictures: Mapping[str, Image.Image], *, layout: str) -> str:
    figures = "".join(
        f'<figure><img alt="{_text(caption)}" src="data:image/png;base64,{_png(picture)}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
        for caption, picture in pictures.items()
    )
    return f'<div class="pictures {layout}">{figures}</div>'


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _classes(manifest: Mapping[str, Any]) -> str:
    rows = manifest.get("classes", ())
    total = sum(row["pixels"] for row in rows)
    heading, sizes = _sizes(rows)
    cells = "".join(
        f'<tr><td><span class="swatch" style="background:{_text(row.get("color", "#fff"))}">'
        f'</span>{_text(row["name"])}</td><td class="n">{_text(row["id"])}</td>'
        f'<td class="n">{row["pixels"]:,}</td><td class="n">{row["pixels"] / (total or 1):.2%}</td>'
        f'<td class="n">{size}</td></tr>'
        for row, size in zip(rows, sizes, strict=True)
    )
    if unknown := manifest.get("nodata_pixels"):
        empty = "<td></td>"
        cells += f'<tr><td>nodata</td>{empty}<td class="n">{unknown:,}</td>{empty}{empty}</tr>'
    return (
        '<h2>Classes</h2><table><tr><th>class</th><th class="n">id</th><th class="n">pixels</th>'
        f'<th class="n">share</th><th class="n">{heading}</th></tr>{cells}</table>'
    )


def _sizes(rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """Heading and cells of the size column: ml, ha, or km2 from a thousand hectares on."""
    if all("volume_ml" in row for row in rows):
        return "ml", [f"{row['volume_ml']:,.2f}" for row in rows]
    if not all("area_m2" in row for row in rows):
        return "size", ["unknown"] * len(rows)
    large = sum(row["area_m2"] for row in rows) >= 1e7
    unit, square_metres = ("km\u00b2", 1e6) if large else ("ha", 1e4)
    return unit, [f"{row['area_m2'] / square_metres:,.2f}" for row in rows]


def _timings(records: Iterable[Record]) -> str:
    worked = [r for r in records if r.status == "done" and not r.skipped]
    seconds = {stage: np.array([r.seconds.get(stage, 0.0) for r in worked]) for stage in STAGES}
    if not worked:
        return "<h2>Tile timings</h2><p>No tile was computed.</p>"
    cells = "".join(
        f'<tr><td><span class="swatch" style="background:{color}"></span>{stage}</td>'
        f'<td class="n">{np.percentile(seconds[stage], 50):.3f}</td>'
        f'<td class="n">{np.percentile(seconds[stage], 95):.3f}</td>'
        f'<td class="n">{seconds[stage].sum():.1f}</td></tr>'
        for stage, color in STAGES.items()
    )
    return (
        f"<h2>Tile timings</h2>{_bar({k: float(v.sum()) for k, v in seconds.items()})}"
        '<table><tr><th>seconds a tile</th><th class="n">p50</th><th class="n">p95</th>'
        f'<th class="n">all {len(worked)}</th></tr>{cells}</table>'
    )


def _waits(stages: Mapping[str, Any]) -> str:
    """Who stood idle, and for want of what; nothing where no stage ran."""
    rows = "".join(
        f'<tr><td>{WAITED_FOR[name]}</td><td class="n">{stage["busy_share"]:.0%}</td>'
        f'<td class="n">{stage["busy_s"]:.1f}</td><td>{_reasons(stage["waited_s"])}</td></tr>'
        for name, stage in stages.items()
    )
    if not rows:
        return ""
    return (
        "<h2>Who waited for whom</h2>"
        '<table><tr><th></th><th class="n">busy</th><th class="n">seconds</th>'
        f"<th>stood idle, in seconds, for want of</th></tr>{rows}</table>"
    )


def _reasons(waited_s: Mapping[str, float]) -> str:
    """The longest wait first; what is below a tenth of a second is left out."""
    longest = sorted(waited_s.items(), key=lambda item: -item[1])
    told = [f"{WAITED_FOR[name]} {s:.1f}" for name, s in longest if s >= 0.05]
    return ", ".join(told) or "nothing"


def _bar(totals: Mapping[str, float]) -> str:
    """The stages' shares of all seconds, as one bar."""
    whole, left, parts = sum(totals.values()) or 1.0, 0.0, ""
    for stage, seconds in totals.items():
        width = 100 * seconds / whole
        parts += (
            f'<rect x="{left:.2f}" width="{width:.2f}" height="6" fill="{STAGES[stage]}">'
            f"<title>{stage} {width:.0f} %</title></rect>"
        )
        left += width
    return (
        '<svg viewBox="0 0 100 6" preserveAspectRatio="none" width="100%" height="16"'
        f' role="img" aria-label="share of each stage">{parts}</svg>'
    )


def _seam(seam: Mapping[str, Any] | None, pictures: Mapping[str, Image.Image]) -> str:
    """The certificate: windows astride tile borders beside windows within tiles."""
    if not seam:
        return ""
    inner = seam["interior"]
    verdict = {True: "passed", False: "FAILED", None: "no verdict"}[seam["passed"]]
    text = f"<h2>Seams</h2><p>{verdict}{': ' if seam['reason'] else ''}{_text(seam['reason'])}</p>"
    if not seam["windows"]:
        return text
    rows = "".join(
        f"<tr><th>{name}</th>"
        + "".join(f'<td class="n">{form.format(part[key])}</td>' for part in (seam, inner))
        + "</tr>"
        for key, (name, form) in SEAM_ROWS.items()
        if seam.get(key) is not None and inner.get(key) is not None
    )
    heads = '<th></th><th class="n">astride tile borders</th><th class="n">within tiles</th>'
    return f"{text}<table><tr>{heads}</tr>{rows}</table>{_pictures(pictures, layout='pairs')}"


def _plan(manifest: Mapping[str, Any]) -> dict[str, Any]:
    halo, crf = manifest.get("halo"), manifest.get("crf")
    peak = manifest.get("peak_memory_bytes")
    return {
        "area": manifest.get("aoi"),
        "tile": manifest.get("tile"),
        "halo": halo,
        "halo work": f"{manifest['halo_work_ratio']:.2f} times that of one pass"
        if "halo_work_ratio" in manifest
        else None,
        "windows": manifest.get("windows"),
        "context": manifest.get("context"),
        "mean of": manifest.get("average"),
        "output stride": manifest.get("output_stride"),
        "CRF": "off" if crf is None else crf,
        "device": manifest.get("device"),
        "precision": manifest.get("precision"),
        "peak memory": f"{peak / 2**20:,.0f} MiB" if peak else None,
    }


def _provenance(manifest: Mapping[str, Any]) -> dict[str, Any]:
    source, model = manifest.get("source", {}), manifest.get("model", {})
    return {
        "output": manifest.get("output"),
        "output SHA-256": manifest.get("output_sha256"),
        "fingerprint": manifest.get("fingerprint"),
        "model": f"{model.get('name', '')} {model.get('version', '')}",
        "model digest": model.get("digest"),
        **{f"source {key}": source.get(key) for key in PROVENANCE},
        "MLflow run": manifest.get("mlflow_run_id"),
        "versions": manifest.get("versions"),
    }


def _table(values: Mapping[str, Any]) -> str:
    """Name and value, row by row; what is absent is left out."""
    rows = "".join(
        f"<tr><th>{_text(name)}</th><td>{_folded(value)}</td></tr>"
        for name, value in values.items()
        if value not in (None, (), [], "")
    )
    return f"<table>{rows}</table>"


def _folded(value: Any) -> str:
    text = _text(value)
    if len(text) <= LONG_TEXT:
        return text
    return f"<details><summary>show</summary>{text}</details>"
