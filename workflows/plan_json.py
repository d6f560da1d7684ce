"""How plan.json and the manifest say what a plan holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.domain import Reach, Region, Sample
from pipeline.errors import PlanError

if TYPE_CHECKING:
    from workflows.segment_plan import SegmentPlan


def halo_json(reach: Reach) -> dict[str, Any]:
    """The halo: per axis and side, and the pooling window, in pixels."""
    return {
        "before": reach.halo.before,
        "after": reach.halo.after,
        "window": reach.window.size if reach.window else None,
    }


def samples_before(found: Mapping[str, Any]) -> tuple[Sample, ...]:
    """Those of an earlier run's plan.json. Raises PlanError where it is damaged."""
    try:
        return tuple(
            Sample(row["kind"], Region(*(tuple(row["region"][end]) for end in ("start", "stop"))))
            for row in found["samples"]
        )
    except (KeyError, TypeError) as error:
        raise PlanError(
            f"plan.json is damaged: 'samples' holds {found.get('samples')!r}; start over with"
            " --fresh"
        ) from error


def windows_json(plan: SegmentPlan) -> dict[str, Any]:
    """What is computed at once, how large, and whether any tile gives the same bytes.

    On a GPU the last is not known: its kernels may mix places that a tile needs with others.
    """
    side_px, device = plan.resolved.canonical_px, plan.resolved.device
    kind = "rows" if side_px is None else "canonical"
    kind = "none" if plan.stages == 1 else kind
    return {
        "kind": kind,
        "side_px": side_px,
        "features": plan.resolved.window if kind == "rows" else None,
        "maps": "host" if plan.resolved.hosted else "device",
        "same_bytes_for_any_tile": side_px is not None and plan.crf is None and device == "cpu",
    }


def windows_words(plan: SegmentPlan) -> str:
    """The same, for people."""
    values = windows_json(plan)
    if values["kind"] == "none":
        return "the network as one"
    if values["kind"] == "rows":
        maps = ", maps in the memory of the host" if plan.resolved.hosted else ""
        return f"windows of rows, {values['features']} features a side{maps}"
    same = " (the same bytes for any tile)" if values["same_bytes_for_any_tile"] else ""
    return f"canonical windows of {values['side_px']} px{same}"
