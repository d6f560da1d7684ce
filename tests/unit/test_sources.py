"""What a batch finds, and what it calls it: an id is a file's name, so it must be a safe one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.domain import check_case_id
from pipeline.errors import PlanError, SourceError
from workflows.sources import Candidate, Made, find_sources


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def found(
    asked: list[str | Path],
    *,
    results: Path = Path("/nowhere"),
    outputs: frozenset[str] = frozenset(),
    owners: dict[str, str] | None = None,
) -> list[Candidate]:
    return find_sources(asked, Made(results=results, outputs=outputs, owners=owners or {}))


def ids(asked: list[str | Path], *, results: Path = Path("/nowhere")) -> list[str]:
    return [one.id for one in found(asked, results=results)]


def test_a_folder_is_walked_and_its_folders_are_in_the_ids(tmp_path: Path) -> None:
    """Two files of one name in two folders must not overwrite each other's mask."""
    for name in ("scan.nii.gz", "a/scan.nii.gz", "b/c/scan.nii.gz", "b/x.TIF", "b/x.tif.aux.xml"):
        touch(tmp_path / name)
    assert ids([tmp_path]) == ["scan", "a__scan", "b__x", "b__c__scan"]


def test_hidden_files_runs_and_results_are_no_sources(tmp_path: Path) -> None:
    """A batch beside its own results would segment its masks the next night."""
    touch(tmp_path / "in.tif")
    touch(tmp_path / ".partial-in.tif")
    touch(tmp_path / ".cache/x.tif")
    touch(tmp_path / "old.tif.run/scratch/x.nii")
    touch(tmp_path / "old.tif.run/lease.lock")
    touch(tmp_path / "masks/in.tif")
    assert ids([tmp_path], results=tmp_path / "masks") == ["in"]
    assert ids([f"{tmp_path}/**/*.tif"], results=tmp_path / "masks") == ["in"]


def test_globs_files_and_folders_may_be_mixed_and_meet(tmp_path: Path) -> None:
    """One file asked for twice is one case."""
    for name in ("a.tif", "b.tif", "c.nii"):
        touch(tmp_path / name)
    asked = [tmp_path / "b.tif", f"{tmp_path}/*.tif", tmp_path]
    assert sorted(ids(asked)) == ["a", "b", "c"]


def test_a_file_whose_name_has_glob_characters_is_that_file(tmp_path: Path) -> None:
    """Brackets are common in names of downloads."""
    path = touch(tmp_path / "scan [1].tif")
    assert [one.path for one in found([path])] == [path]
    assert ids([path]) == ["scan__1_"]


def test_a_file_that_is_not_there_is_a_case_that_fails_not_a_batch(tmp_path: Path) -> None:
    """One typing error in a list of thousands must not stop the night."""
    (one,) = found([tmp_path / "none.tif"])
    with pytest.raises(SourceError, match=r"none\.tif"):
        one.stamp()


def test_a_list_gives_ids_and_paths_beside_it(tmp_path: Path) -> None:
    """Paths are relative to the list, so that list and data move together."""
    touch(tmp_path / "data/x.tif")
    table = tmp_path / "cases.csv"
    table.write_text("id,path,note\nparcel-7,data/x.tif,ours\n\n")
    (one,) = found([table])
    assert (one.id, one.path) == ("parcel-7", tmp_path / "data/x.tif")


def test_a_list_from_a_spreadsheet_may_have_empty_rows(tmp_path: Path) -> None:
    """Programs write rows that were emptied as commas alone; the whole batch would be refused."""
    touch(tmp_path / "x.tif")
    table = tmp_path / "cases.csv"
    table.write_text("id, path,note\r\n,,\r\nparcel-7, x.tif,\r\n, ,\r\n\r\n,lost.tif,\r\n")
    with pytest.raises(PlanError, match=r"line 6: .*id and path, filled.* id, path, note$"):
        found([table])
    table.write_text(table.read_text().replace("lost.tif", ""))
    (one,) = found([table])
    assert (one.id, one.path) == ("parcel-7", tmp_path / "x.tif")


@pytest.mark.parametrize(
    "text", ["path\nx.tif\n", "id,path\n,x.tif\n", "id,path\na,\n", "\xff,\x00"]
)
def test_a_list_that_is_none_is_refused_by_line(tmp_path: Path, text: str) -> None:
    """A list without ids would name all masks alike."""
    table = tmp_path / "cases.csv"
    table.write_bytes(text.encode("latin-1"))
    with pytest.raises(PlanError, match=r"cases\.csv"):
        found([table])


@pytest.mark.parametrize(
    "bad", ["../out", "a/b", "/etc/x", "..", ".hidden", "a..b", "", "a b", "x" * 129]
)
def test_an_id_cannot_leave_the_directory(tmp_path: Path, bad: str) -> None:
    """An id becomes a file's name: ``../`` in it would write anywhere."""
    with pytest.raises(PlanError):
        check_case_id(bad)
    table = tmp_path / "cases.csv"
    table.write_text(f'id,path\n"{bad or "?"}",x.tif\ngood,y.tif\n')
    several = found([table])
    assert [one.id for one in several if not one.refused] == ["good"]
    assert len(several) == 2


def test_two_sources_of_one_id_are_told_apart_by_refusing_the_second(tmp_path: Path) -> None:
    """The second mask would replace the first."""
    touch(tmp_path / "a/x.tif")
    touch(tmp_path / "b/x.tif")
    asked: list[str | Path] = [tmp_path / "a/x.tif", tmp_path / "b/x.tif"]
    first, second = found(asked)
    assert not first.refused
    assert "a/x.tif" in second.refused
    first, second = found(asked, owners={"x": str(tmp_path / "b/x.tif")})
    assert "b/x.tif" in first.refused, "the id stays with the source that had it"
    assert not second.refused


def test_a_stamp_changes_with_content_time_rights_and_sidecars(tmp_path: Path) -> None:
    """It stands for the content: what it overlooks is never computed again."""
    path = touch(tmp_path / "x.tif")
    one = Candidate(id="x", path=path)
    seen = [one.stamp()]
    assert one.stamp() == seen[0]
    path.write_bytes(b"yy")
    seen.append(one.stamp())
    os.utime(path, ns=(0, 12345))
    seen.append(one.stamp())
    path.chmod(0o600)
    seen.append(one.stamp())
    touch(tmp_path / "x.tif.aux.xml")
    seen.append(one.stamp())
    touch(tmp_path / "x.tfw")  # moved, it lies elsewhere
    seen.append(one.stamp())
    assert len(set(seen)) == len(seen)


def test_a_file_that_names_others_has_no_stamp(tmp_path: Path) -> None:
    """A VRT stays as it is while the images it names are replaced."""
    assert Candidate(id="x", path=touch(tmp_path / "x.vrt")).stamp() == ""


def test_masks_of_earlier_runs_are_no_sources_even_beside_the_images(tmp_path: Path) -> None:
    """``-o`` may be the folder of the images, or above it; sources must not vanish for it."""
    for name in ("in/a.tif", "in/sub/b.tif", "in/a_mask.tif"):
        touch(tmp_path / name)
    made = frozenset([os.path.realpath(tmp_path / "in/a_mask.tif")])
    for results in (tmp_path / "in", tmp_path):
        several = found([tmp_path / "in"], results=results, outputs=made)
        assert [one.id for one in several] == ["a", "sub__b"]
        assert [one.id for one in found([f"{tmp_path}/in/*.tif"], results=results)][:1] == ["a"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    """An archive is often a farm of links; one that leads back would be walked for ever."""
    touch(tmp_path / "elsewhere/x.tif")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/back").symlink_to(tmp_path / "in")
    (tmp_path / "in/round.tif").symlink_to(tmp_path / "in/round.tif")
    assert sorted(ids([tmp_path / "in"])) == ["linked__x", "round"]


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    """Opening it would block the night."""
    os.mkfifo(tmp_path / "x.nii.gz")
    (one,) = found([tmp_path])
    assert "is no file" in one.refused


def test_ids_that_lose_letters_or_are_cut_stay_apart(tmp_path: Path) -> None:
    """Two cities, or two series of a deep archive, are two cases."""
    for name in (
        "北京.tif",
        "上海.tif",
        f"{'a' * 100}/{'b' * 100}/x.tif",
        f"{'a' * 100}/{'b' * 100}/y.tif",
    ):
        touch(tmp_path / name)
    names = ids([tmp_path])
    assert len(set(names)) == 4
    assert all(check_case_id(name) for name in names)


def test_a_glob_below_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A share that is not mounted is no night without new scans."""
    with pytest.raises(PlanError, match="no folder"):
        found([f"{tmp_path}/away/*.tif"])
    assert found([f"{tmp_path}/*.tif"]) == []
