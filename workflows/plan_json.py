"""How plan.json and the manifest say what a plan holds."""

from __future__ import annotations

from typing import Any

from pipeline.domain import Reach


def halo_json(reach: Reach) -> dict[str, Any]:
    """The halo: per axis and side, and the pooling window, in pixels."""
    return {
        "before": reach.halo.before,
        "after": reach.halo.after,
        "window": reach.window.size if reach.window else None,
    }


def windows_json(canonical_px: int | None, *, with_crf: bool) -> dict[str, Any]:
    """What is computed at once, its side in pixels, and whether any tile gives the same bytes."""
    return {
        "kind": "rows" if canonical_px is None else "canonical",
        "side_px": canonical_px,
        "same_bytes_for_any_tile": canonical_px is not None and not with_crf,
    }
