"""Workflow files: what is refused, where paths begin, when ticks are; clock changes included."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import yaml

from pipeline.errors import PlanError
from workflows.workflow_file import Workflow, read_workflow

VIENNA = ZoneInfo("Europe/Vienna")
GOOD = {
    "name": "region-weekly",
    "sources": ["incoming/*.tif", "/data/scans", "list.csv"],
    "models": ["models:/landcover@champion", "bundles/organs"],
    "output": "masks/{tick:%Y-%m-%d}/{id}",
    "state": "state",
    "cron": "0 4 * * mon",
    "timezone": "Europe/Vienna",
}


def written(folder: Path, **changes: object) -> Path:
    """A workflow file: GOOD with ``changes``; None takes a key away."""
    values = {key: value for key, value in (GOOD | changes).items() if value is not None}
    path = folder / "workflow.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def daily(cron: str, zone: str = "Europe/Vienna") -> Workflow:
    return Workflow.model_validate(GOOD | {"cron": cron, "timezone": zone})


def ticks(workflow: Workflow, start: datetime, stop: datetime) -> list[str]:
    """All ticks in ``[start, stop)``, in UTC, walked forward."""
    found, now = [], start - timedelta(minutes=1)
    while (now := workflow.next_tick(now)) < stop:
        found.append(f"{now:%d %H:%M}")
    return found


def test_relative_paths_begin_at_the_files_folder_and_uris_stay(tmp_path, monkeypatch):
    """Cron starts the command in the user's home: a path read from there is another file."""
    monkeypatch.chdir("/")
    (tmp_path / "w").mkdir()
    found = read_workflow(written(tmp_path / "w", options={"crf": "my.yaml", "aoi": "f.gpkg"}))
    at = str(tmp_path / "w")
    assert found.sources == (f"{at}/incoming/*.tif", "/data/scans", f"{at}/list.csv")
    assert found.models == ("models:/landcover@champion", f"{at}/bundles/organs")
    assert found.state == tmp_path / "w" / "state"
    assert (found.options.crf, found.options.aoi) == (f"{at}/my.yaml", Path(f"{at}/f.gpkg"))
    assert found.output_at(datetime(2026, 11, 15, 23, 30, tzinfo=UTC)) == (
        f"{at}/masks/2026-11-16/{{id}}"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "../up"}, "name"),
        ({"name": "a b"}, "name"),
        ({"cron": None}, "key cron is missing"),
        ({"timezone": None}, "key timezone is missing"),
        ({"color": "red"}, "unknown key color"),
        ({"cron": "0 4 * *"}, "cron must be five"),
        ({"cron": "@daily"}, "cron must be five"),
        ({"cron": "0 0 4 * * mon"}, "cron must be five"),
        ({"cron": "0 0 30 2 *"}, "cron must be five"),
        ({"cron": "H 4 * * *"}, "cron must be five"),
        ({"cron": "R 4 * * *"}, "cron must be five"),
        ({"cron": "0 R(1-5) * * *"}, "cron must be five"),
        ({"timezone": "Europe/Wien"}, "timezone must be a zone"),
        ({"timezone": "Europe"}, "timezone must be a zone"),
        ({"timezone": "../etc"}, "timezone must be a zone"),
        ({"output": "masks"}, "needs {id}"),
        ({"output": "masks/{id}/{name}"}, "found {name}"),
        ({"output": "masks/{id.__class__}"}, "found {id.__class__}"),
        ({"output": "masks/{tick}/{id}"}, "found {tick}"),
        ({"output": "masks/{{id}}/{id}"}, "found a brace alone"),
        ({"output": "masks/{id}}"}, "found a brace alone"),
        ({"sources": []}, "sources"),
        ({"sources": "incoming"}, "sources"),
        ({"models": []}, "models"),
        ({"options": {"run_dir": "x"}}, "options does not take run_dir"),
        ({"options": {"fresh": True}}, "options does not take fresh"),
        ({"options": {"halos": "64"}}, "unknown key options.halos"),
        ({"options": {"tile": 0}}, "options.tile"),
        ({"options": {"crf": False}}, "write it in quotes"),
        ({"options": "crf"}, "options"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key_in_one_line(tmp_path, changes, words):
    """A workflow that is misread is noticed a week later."""
    path = written(tmp_path, **changes)
    with pytest.raises(PlanError) as refusal:
        read_workflow(path)
    assert str(path) in str(refusal.value)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "name: [\n", "\0"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    """A traceback in a log says nothing to an operator."""
    path = tmp_path / "workflow.yaml"
    path.write_text(text)
    with pytest.raises(PlanError, match=str(path)):
        read_workflow(path)
    with pytest.raises(PlanError, match="absent"):
        read_workflow(tmp_path / "absent.yaml")


def test_masks_may_not_lie_where_a_later_tick_looks_for_sources(tmp_path):
    """The masks of last week would be segmented this week, and theirs the week after."""
    for sources in (["."], ["masks"], ["**/*.tif"], [str(tmp_path)]):
        with pytest.raises(PlanError, match=r"output .* inside .*sources"):
            read_workflow(written(tmp_path, sources=sources))
    for sources in (["*.tif"], ["incoming"], ["masks.csv"], ["incoming/**/*.tif"]):
        read_workflow(written(tmp_path, sources=sources))
    read_workflow(written(tmp_path, sources=["."], output="masks/{id}"))


def test_the_last_tick_is_at_or_before_now():
    """At 04:00:00 sharp, when cron starts us, last week's tick would be done again."""
    weekly = daily("0 4 * * mon")
    monday = datetime(2026, 11, 16, 3, 0, tzinfo=UTC)
    week = timedelta(days=7)
    assert weekly.last_tick(monday) == monday
    assert weekly.last_tick(monday + timedelta(microseconds=1)) == monday
    assert weekly.last_tick(monday - timedelta(microseconds=1)) == monday - week
    assert weekly.last_tick(monday.astimezone(VIENNA) + timedelta(days=6)) == monday
    assert weekly.next_tick(monday) == monday + week


def test_days_of_the_week_are_numbered_as_in_cron():
    """APScheduler's own reading of the same line is a day late: 1 is its Tuesday."""
    from apscheduler.triggers.cron import CronTrigger

    sunday = datetime(2026, 11, 15, 12, tzinfo=UTC)
    for text in ("0 4 * * 1", "0 4 * * mon"):
        assert daily(text).next_tick(sunday).weekday() == 0
    for text in ("0 4 * * 0", "0 4 * * 7", "0 4 * * sun"):
        assert daily(text).next_tick(sunday).weekday() == 6
    theirs = CronTrigger.from_crontab("0 4 * * 1", timezone=VIENNA)
    assert theirs.get_next_fire_time(None, sunday).weekday() == 1


def test_a_time_that_the_spring_clock_skips_is_due_when_the_gap_ends():
    """02:30 does not exist on 29 March 2026 in Vienna: the day must still have its tick, once."""
    span = datetime(2026, 3, 28, tzinfo=UTC), datetime(2026, 3, 31, tzinfo=UTC)
    assert ticks(daily("30 2 * * *"), *span) == ["28 01:30", "29 01:00", "30 00:30"]
    gap = datetime(2026, 3, 29, 0, 59, tzinfo=UTC)
    assert daily("30 2 * * *").last_tick(gap) == datetime(2026, 3, 28, 1, 30, tzinfo=UTC)
    assert daily("30 2 * * *").last_tick(gap + timedelta(minutes=1)).hour == 1


def test_a_time_that_the_autumn_clock_repeats_is_two_ticks():
    """Keys in local time would make one of both, and call the second done."""
    span = datetime(2026, 10, 24, tzinfo=UTC), datetime(2026, 10, 27, tzinfo=UTC)
    assert ticks(daily("30 2 * * *"), *span) == ["24 00:30", "25 00:30", "25 01:30", "26 01:30"]
    first = datetime(2026, 10, 25, 0, 45, tzinfo=UTC)
    assert daily("30 2 * * *").last_tick(first) == datetime(2026, 10, 25, 0, 30, tzinfo=UTC)
    again = first + timedelta(hours=1)
    assert daily("30 2 * * *").last_tick(again) == datetime(2026, 10, 25, 1, 30, tzinfo=UTC)


@pytest.mark.parametrize("day", ["2026-03-29", "2026-10-25", "2026-07-01"])
@pytest.mark.parametrize("cron", ["17 * * * *", "*/20 * * * *", "30 2 * * *", "5,50 1-4 * * sun"])
def test_looking_back_from_any_minute_finds_what_looking_forward_found(day, cron):
    """A tick that the daemon fires and `schedule tick` does not know would never be run."""
    workflow = daily(cron)
    start = datetime.fromisoformat(f"{day}T00:00+00:00") - timedelta(hours=2)
    latest = workflow.last_tick(start)
    for minutes in range(8 * 60):
        now = start + timedelta(minutes=minutes)
        if workflow.next_tick(latest) <= now:
            latest = workflow.next_tick(latest)
        assert workflow.last_tick(now + timedelta(seconds=7)) == latest


@pytest.mark.parametrize("day", ["2026-03-29", "2026-10-25"])
@pytest.mark.parametrize(("cron", "minutes"), [("17 * * * *", {17}), ("*/30 * * * *", {0, 30})])
def test_hourly_ticks_are_those_that_reading_a_clock_each_minute_finds(day, cron, minutes):
    """An oracle without cron: hours that exist twice have their ticks twice, skipped ones none."""
    start = datetime.fromisoformat(f"{day}T00:00+00:00") - timedelta(hours=3)
    moments = [start + timedelta(minutes=m) for m in range(9 * 60)]
    wanted = [m for m in moments if m.astimezone(VIENNA).minute in minutes]
    assert ticks(daily(cron), start, moments[-1] + timedelta(minutes=1)) == [
        f"{m:%d %H:%M}" for m in wanted
    ]
