"""What a batch never does: judge wrongly, replace what is not its own, or lose a case."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batches import OPTIONS, computed, states, write_scene, write_volume
from scenes import fresh

from adapters.lease_file import LeaseFile
from adapters.ledger_file import CaseLedgerFile
from pipeline.errors import CrfError, LeaseHeldError, PlanError, StoreError
from workflows.batching import batch
from workflows.run_dir import file_digest
from workflows.segmenting import segment


def test_a_quarantined_input_is_judged_again_only_when_it_changes(
    archive: Path, tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """A verdict on the same bytes would be the same; the repaired file must get through."""
    out = tmp_path / "out"
    run(archive, out)
    ledger = tmp_path / "out.run/ledger"
    before = len(list(CaseLedgerFile(ledger, owner="t").history()))
    assert states(run(archive, out))["gray"] == "quarantined"
    again = list(CaseLedgerFile(ledger, owner="t").history())[before:]
    assert {record.case for record in again} == {"cut"}, "only what failed is tried again"
    write_scene(archive / "gray.tif", (40, 40), seed=3)
    write_scene(archive / "cut.tif", (40, 40), seed=4)
    result = run(archive, out)
    assert computed(result) == {"gray", "cut"}
    assert states(result)["gray"] == states(result)["cut"] == "done"


def test_a_file_that_this_batch_did_not_make_is_not_replaced(
    archive: Path, tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """Somebody's hand-drawn mask may lie where ours would go."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.tif").write_bytes(b"drawn by hand")
    result = run(archive / "a.tif", out)
    assert states(result) == {"a": "failed"}
    assert (out / "a.tif").read_bytes() == b"drawn by hand"
    assert states(run(archive / "a.tif", out, fresh=True)) == {"a": "done"}


def test_a_mask_that_a_person_has_corrected_is_not_replaced(
    archive: Path, tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """Hours of correction by hand must not end with the next night."""
    out = tmp_path / "out"
    run(archive / "a.tif", out)
    (out / "a.tif").write_bytes(b"corrected")
    assert states(run(archive / "a.tif", out)) == {"a": "failed"}
    write_scene(archive / "a.tif", (50, 60), seed=8)
    assert states(run(archive / "a.tif", out)) == {"a": "failed"}
    assert (out / "a.tif").read_bytes() == b"corrected"


def test_no_mask_takes_the_place_of_a_source(
    tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """Not even with --fresh, which is what the refusal of a foreign file advises."""
    for number, name in enumerate(("a.tif", "b.tif")):
        write_scene(tmp_path / name, (64, 64), seed=number)
    before = [file_digest(tmp_path / name) for name in ("a.tif", "b.tif")]
    (tmp_path / "crossed.csv").write_text("id,path\na,b.tif\nb,a.tif\n")
    result = run(tmp_path / "crossed.csv", tmp_path, fresh=True, run_dir=tmp_path / "state")
    assert states(result) == {"a": "failed", "b": "failed"}
    assert [file_digest(tmp_path / name) for name in ("a.tif", "b.tif")] == before


def test_a_path_where_a_list_of_them_is_needed_is_refused(
    archive: Path, tmp_path: Path, slim: Path
) -> None:
    """Of a text each letter would be a source: the dot in it is all of the working directory."""
    for sources, models in ((str(archive), [slim]), ([archive], slim), ([archive], [])):
        with pytest.raises(PlanError, match=r"lists of paths|no model"):
            batch(sources, tmp_path / "out", models=models)
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_the_machine_or_the_request_is_no_verdict_on_a_case(
    archive: Path, tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """A verdict stands: it would keep a good scan out for ever."""
    out = tmp_path / "out"
    with pytest.raises(PlanError, match="cuda"):
        run(archive, out, device="cuda")
    with pytest.raises(CrfError, match=r"none\.yaml"):
        run(archive, out, crf="none.yaml")
    assert states(run(archive, out))["a"] == "done"


def test_tiles_that_were_allowed_to_fail_are_told_and_tried_again(
    archive: Path, tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """A mask with holes that is called done would never be filled."""
    out = tmp_path / "out"
    first = run(archive / "cut.tif", out, allow_failed=99)
    assert states(first) == {"cut": "done"}
    assert "tiles failed" in first["cases"][0]["reason"]
    assert computed(run(archive / "cut.tif", out, allow_failed=99)) == {"cut"}
    assert states(run(archive / "cut.tif", out)) == {"cut": "failed"}


def test_a_file_that_fails_three_nights_is_quarantined(
    archive: Path, tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """Else each night pays for it again."""
    found = [states(run(archive / "cut.tif", tmp_path / "out"))["cut"] for _ in range(4)]
    assert found == ["failed", "failed", "quarantined", "quarantined"]


def test_a_damaged_ledger_is_put_aside_by_fresh(
    archive: Path, tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """The message says that --fresh helps."""
    out = tmp_path / "out"
    run(archive / "a.tif", out)
    (ledger,) = (tmp_path / "out.run/ledger").glob("*.jsonl")
    ledger.write_bytes(b"garbage\n" + ledger.read_bytes())
    with pytest.raises(StoreError, match="--fresh"):
        run(archive / "a.tif", out)
    assert states(run(archive / "a.tif", out, fresh=True)) == {"a": "done"}
    assert list((tmp_path / "out.run").glob("ledger-damaged-*"))


def test_run_directories_of_an_image_and_of_a_batch_do_not_mix(
    archive: Path, tmp_path: Path, run: Callable[..., dict[str, Any]], slim: Path
) -> None:
    """--fresh of the one would delete the ledger of the other."""
    run(archive / "a.tif", tmp_path / "out")
    taken = OPTIONS.model_copy(update={"run_dir": tmp_path / "out.run", "fresh": True})
    with pytest.raises(PlanError, match="a batch"):
        segment(archive / "a.tif", tmp_path / "m.tif", model=slim, options=taken)
    segment(archive / "a.tif", tmp_path / "m.tif", model=slim, options=OPTIONS)
    with pytest.raises(PlanError, match="one image"):
        run(archive / "a.tif", tmp_path / "o2", run_dir=tmp_path / "m.tif.run")


def test_a_name_that_is_no_text_is_a_row_like_any_other(
    archive: Path, tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """Old archives have names in Latin-1, which GDAL cannot open."""
    good = archive / "a.tif"
    os.rename(os.fsencode(good), os.fsencode(archive) + b"/M\xfcller.tif")
    result = run(archive, tmp_path / "out")
    assert result["counts"]["done"] == 2
    assert "UnicodeEncodeError" in (tmp_path / "out/cases.csv").read_text()


def test_a_second_batch_is_turned_away_while_the_first_runs(
    archive: Path, tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """Two drivers would do everything twice."""
    with LeaseFile(tmp_path / "out.run"), pytest.raises(LeaseHeldError):
        run(archive, tmp_path / "out")


def test_two_models_for_one_kind_are_refused(
    archive: Path, tmp_path: Path, run: Callable[..., dict[str, Any]], slim: Path
) -> None:
    """Which of them a scene gets would be chance."""
    with pytest.raises(PlanError, match="2 axes"):
        run(archive, tmp_path / "out", models=[slim, fresh(tmp_path / "twin").path])
    assert not (tmp_path / "out").exists()


def test_a_replaced_input_whose_batch_was_killed_early_may_replace_its_old_mask(
    tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """A case that is queued again still owns the mask of its last run."""
    source, out = write_scene(tmp_path / "a.tif", (64, 64), seed=1), tmp_path / "out"
    run(source, out)
    before = file_digest(out / "a.tif")
    write_scene(source, (64, 64), seed=2)
    result = batch([source], out, models=[fresh(tmp_path / "b").path], options=OPTIONS,
                   stop=lambda: True)  # fmt: skip
    assert result["status"] == "interrupted"
    assert states(run(source, out)) == {"a": "done"}
    assert file_digest(out / "a.tif") != before


def test_an_input_that_was_broken_for_a_night_still_replaces_its_old_mask(
    tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """A run that began to replace a mask and died would call it somebody else's for ever."""
    source, out = write_scene(tmp_path / "a.tif", (64, 64), seed=1), tmp_path / "out"
    run(source, out)
    before = file_digest(out / "a.tif")
    whole = write_scene(source, (64, 64), seed=2).read_bytes()
    source.write_bytes(whole[: len(whole) // 2])
    assert states(run(source, out)) == {"a": "failed"}
    assert file_digest(out / "a.tif") == before
    source.write_bytes(whole)
    assert states(run(source, out)) == {"a": "done"}
    assert file_digest(out / "a.tif") != before


def test_a_refused_namesake_does_not_hide_a_case_that_is_still_to_do(
    tmp_path: Path, slim: Path
) -> None:
    """Both have one id: the one that waits would be missing from the table, and called done."""
    for folder in ("p", "q"):
        (tmp_path / folder).mkdir()
        write_scene(tmp_path / folder / "a.tif", (40, 40), seed=1)
    sources = [tmp_path / "p/a.tif", tmp_path / "q/a.tif"]
    result = batch(sources, tmp_path / "out", models=[slim], options=OPTIONS, stop=lambda: True)
    assert result["status"] == "interrupted"
    assert sorted(row["status"] for row in result["cases"]) == ["failed", "queued"]


def test_a_scan_that_is_cut_short_is_quarantined_by_the_first_run(
    tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """No other night would end better, and its tiles would all say so."""
    scan = write_volume(tmp_path / "short.nii.gz", (40, 41, 42), seed=2)
    scan.write_bytes(scan.read_bytes()[:-2000])
    (case,) = run(scan, tmp_path / "out")["cases"]
    assert (case["status"], case["computed"]) == ("quarantined", False)
    assert "short.nii.gz is damaged" in case["reason"]
    assert not (tmp_path / "out.run/cases/short/scratch").exists()
