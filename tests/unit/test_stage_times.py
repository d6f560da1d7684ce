"""What the manifest says of the stages: busy, waited, and the share of both."""

from __future__ import annotations

from pipeline.domain import TileKey
from pipeline.ports import Record
from workflows.manifest import stages


def record(number: int, *, compute: float, waits: dict[str, dict[str, float]]) -> Record:
    seconds = {"read": 1.0, "compute": compute}
    key = TileKey("scene", "segment", number)
    return Record(key=key, status="done", seconds=seconds, waits=waits)


def test_work_and_waits_of_all_tiles_are_summed_by_stage_and_reason() -> None:
    """A device that idles half the night would be said to be busy."""
    one = record(0, compute=3.0, waits={"compute": {"read": 1.0}, "read": {"tile": 1.0}})
    two = record(1, compute=2.0, waits={"compute": {"read": 0.5, "refine": 1.5}})
    assert stages([one, two]) == {
        "read": {"busy_s": 2.0, "waited_s": {"tile": 1.0}, "busy_share": 0.6667},
        "compute": {"busy_s": 5.0, "waited_s": {"read": 1.5, "refine": 1.5}, "busy_share": 0.625},
    }


def test_a_run_without_new_tiles_has_no_stages() -> None:
    """A rerun that only finishes would claim shares of nothing."""
    assert stages([]) == {}
    assert stages([Record(key=TileKey("a", "segment", 0), status="failed")]) == {}
