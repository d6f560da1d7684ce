"""What is there already is never lost: outputs, run directories, and what a full disk left."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import rasterio
from command import Command, tree
from scenes import texture, write_raster

from adapters.ledger_file import LedgerFile
from adapters.mlflow_tracker import NoTracker
from pipeline.domain import TileKey
from pipeline.errors import FinishError, PlanError
from workflows.config import SegmentOptions
from workflows.run_dir import file_digest
from workflows.segmenting import segment

IMAGE_CYX = np.stack([texture((96, 128), seed=seed) for seed in (1, 2, 3)])


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], slim: Path
) -> Command:
    return Command(monkeypatch, capsys, slim)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """96 x 128 px, three bands, blocks of 32 px; in a folder of its own."""
    (tmp_path / "in").mkdir()
    return write_raster(tmp_path / "in" / "small.tif", IMAGE_CYX, blockxsize=32, blockysize=32)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for what the command writes."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    command: Command, small: Path, out: Path
) -> None:
    """Said at the end of the night, it would cost the night."""
    (out / "folder.tif").mkdir()
    (out / "hidden.tif.msk").touch()  # GDAL applies it to whatever has that name
    asked = {
        out / "hidden.tif": ("hidden.tif.msk", "move it away"),
        out / "o.nii": ("o.nii", "2 axes", ".tif"),
        out / "o.png": ("o.png", "unknown suffix", ".tif"),
        out / "none" / "o.tif": ("o.tif", "none does not exist"),
        out / "folder.tif": ("folder.tif is a directory", "path of a file"),
    }
    before = tree(out)
    for output, words in asked.items():
        command.segment(small, output, "--fresh").refuses(*words)
    assert tree(out) == before


def test_the_scores_of_a_run_are_never_cleared_to_refine_them(
    command: Command, small: Path, out: Path
) -> None:
    """``--fresh`` would delete a night's scores, and write a mask of nodata in their stead."""
    output = out / "o.tif"
    assert command.segment(small, output, "--crf", "off", "--scores", "float16").code == 0
    (out / "crf.yaml").write_text("{iterations: 1, smoothness: {weight: 1, position: 1}}")
    before = tree(out)
    line = ("refine", small, "--scores", f"{output}.run", "--crf", out / "crf.yaml", "-o", output)
    for more in ((), ("--fresh",)):
        command(*line, *more).refuses(f"{output}.run", "that of the scores", "another output")
    assert tree(out) == before


@pytest.mark.parametrize("link", [None, os.link, os.symlink])
def test_the_source_is_never_the_output(
    command: Command, small: Path, out: Path, link: object
) -> None:
    """``-o SOURCE --fresh`` would replace the only copy of an image by its mask."""
    output = small if link is None else out / "o.tif"
    if callable(link):
        link(small, output)
    before = tree(small.parent)
    command.segment(small, output).refuses(output, "the source itself", "another output")
    command.segment(small, output, "--fresh").refuses(output, "the source itself")
    assert tree(small.parent) == before


def test_an_output_of_something_else_stays_until_fresh_replaces_it(
    command: Command, small: Path, out: Path
) -> None:
    """A mistyped name must not destroy last week's mask."""
    output = write_raster(out / "o.tif", IMAGE_CYX[:1])
    before = tree(out)
    command.segment(small, output).refuses(output, "not made by this command", "--fresh")
    assert tree(out) == before
    assert command.segment(small, output, "--fresh").code == 0
    with rasterio.open(output) as mask:
        assert mask.dtypes == ("uint8",)


def test_a_mask_of_other_options_stays_until_fresh_replaces_it(
    command: Command, small: Path, out: Path
) -> None:
    """Two runs must not mix in one file; a bad option with --fresh must delete nothing either."""
    output = out / "o.tif"
    assert command.segment(small, output, "--tile", 32).code == 0
    before = tree(out)
    command.segment(small, output, "--tile", 64).refuses("options", "differ", "--fresh")
    command.segment(small, output, "--tile", 10, "--fresh").refuses("--tile 10")
    command.segment(small, output, "--fresh", "--crf", "none.yaml").refuses("none.yaml")
    command.segment(small, out / "p.tif", "--run-dir", f"{output}.run").refuses(
        f"{output}.run", "holds another run", "--run-dir", "--fresh"
    )
    assert tree(out) == before
    fresh = command.segment(small, output, "--tile", 64, "--fresh")
    assert (fresh.code, fresh.manifest["tile"]) == (0, [64, 64])


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ``segment`` and ``refine`` tell a tracker, in order."""
    words: list[str] = []

    class Told(NoTracker):
        def start(self, *, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
            words.append(f"start {tags['fingerprint']}")
            self.run_id = "one"

        def finish(self, status: str, *, artifacts: Iterable[Path]) -> None:
            if self.run_id is not None:
                words.append(status)

    for module in ("segmenting", "refining"):
        monkeypatch.setattr(f"workflows.{module}.open_tracker", lambda *_, **__: Told())
    return words


def test_a_refused_command_leaves_the_tracker_s_run_of_the_directory_alone(
    command: Command, small: Path, out: Path, told: list[str]
) -> None:
    """A good run would be called failed in MLflow, under the fingerprint of one that never ran."""
    scores = ("--crf", "off", "--scores", "float16", "--tile", 32)
    good = command.segment(small, out / "o.tif", *scores)
    expected = [f"start {good.manifest['fingerprint']}", "done"]
    run = ("--run-dir", out / "o.tif.run")
    command.segment(small, out / "p.tif", *run, "--tile", 64).refuses("holds another run")
    assert told == expected
    (out / "crf.yaml").write_text("{iterations: 1, smoothness: {weight: 1, position: 1}}")
    line = ("refine", small, "--scores", f"{out / 'o.tif'}.run", "--backend", "serial")
    line = (*line, "--crf", out / "crf.yaml", "-o", out / "r.tif", "--json")
    expected += [f"start {command(*line).manifest['fingerprint']}", "done"]
    (out / "crf.yaml").write_text("{iterations: 2, smoothness: {weight: 1, position: 1}}")
    (out / "r.tif").unlink()
    command(*line).refuses("holds another run")
    assert told == expected


def test_other_options_that_mean_the_same_run_find_it_finished(
    command: Command, small: Path, out: Path
) -> None:
    """A run that was resumed with a greater budget would not know its own mask again."""
    output = out / "o.tif"
    assert command.segment(small, output, "--tile", 32).code == 0
    before = tree(out)
    again = command.segment(small, output, "--tile", 32, "--memory-budget", "64GB")
    assert again.code == 0, again.err
    assert tree(out) == before


def test_an_output_among_the_runs_own_files_is_refused(
    command: Command, small: Path, out: Path
) -> None:
    """The next --fresh would delete it; beside them, in the run directory, it is safe."""
    beside = (out / "o.tif", "--run-dir", out)
    assert command.segment(small, *beside).code == 0
    answer = command.segment(small, out / "ledger" / "o.tif", "--run-dir", out)
    answer.refuses("o.tif", out / "ledger", "choose another")
    same = command.segment(small, out / "new.tif", "--run-dir", out / "new.tif")
    same.refuses("new.tif", "run directory as well", "choose another --run-dir")
    (out / "notes.txt").write_text("mine")
    assert command.segment(small, *beside, "--fresh").code == 0
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("more", [(), ("--fresh",)], ids=["plain", "fresh"])
def test_a_directory_of_somebody_elses_is_no_run_directory(
    command: Command, small: Path, out: Path, more: tuple[str, ...]
) -> None:
    """``--run-dir ~`` would otherwise delete what is called ``scratch`` or ``ledger`` there."""
    before = tree(small.parent)
    answer = command.segment(small, out / "o.tif", "--run-dir", small.parent, *more)
    answer.refuses(small.parent, small.name, "empty")
    assert tree(small.parent) == before


def test_a_file_that_appears_where_the_mask_will_go_is_not_replaced(
    slim: Path, small: Path, out: Path
) -> None:
    """Of two commands with one output, the later one would destroy what the earlier one made."""
    output = out / "o.tif"
    asked = SegmentOptions(tile=32, backend="serial", tracking_uri="none")

    def stop() -> bool:
        output.write_bytes(b"theirs")
        return False

    with pytest.raises(FinishError, match=r"o\.tif has appeared while this ran"):
        segment(small, output, model=slim, options=asked, stop=stop)
    assert output.read_bytes() == b"theirs"
    with pytest.raises(PlanError, match="not made by this command"):
        segment(small, output, model=slim, options=asked)
    output.unlink()
    assert segment(small, output, model=slim, options=asked)["status"] == "done"


def test_an_output_that_was_changed_since_is_not_overwritten(
    command: Command, small: Path, out: Path
) -> None:
    """A person's edits to a finished mask would be lost to a rerun."""
    output = out / "o.tif"
    assert command.segment(small, output).code == 0
    output.write_bytes(b"edited")
    command.segment(small, output).refuses(output, "differ", "--fresh")
    assert output.read_bytes() == b"edited"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"tiles": 1}'])
def test_a_damaged_plan_is_named_and_fresh_starts_over(
    command: Command, small: Path, out: Path, text: str
) -> None:
    """A plan that is guessed at could mix the tiles of two runs."""
    output, run = out / "o.tif", out / "o.tif.run"
    assert command.segment(small, output).code == 0
    (run / "plan.json").write_text(text)
    before = tree(out)
    command.segment(small, output).refuses(run / "plan.json", "--fresh")
    command("status", run).refuses(run / "plan.json", "--fresh")
    assert tree(out) == before
    assert command.segment(small, output, "--fresh").code == 0


def test_a_run_directory_that_cannot_be_made_is_a_failure_in_one_line(
    command: Command, small: Path, out: Path
) -> None:
    """A system error without a name leaves people guessing which of the paths is meant."""
    (out / "taken").write_text("a file")
    answer = command.segment(small, out / "o.tif", "--run-dir", out / "taken")
    answer.refuses(out / "taken", "choose another --run-dir", code=1)
    command("status", out / "taken").refuses("holds no run")
    assert set(tree(out)) == {out / "taken"}


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory; the test is skipped where none can be mounted."""
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(line, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_place_is_refused(command: Command, small: Path, out: Path) -> None:
    """Outputs before the work, run directories when they are taken."""
    disk = out / "disk"
    with mounted(disk, "size=1m,ro"):
        command.segment(small, disk / "o.tif").refuses(disk, "cannot be written to")
        elsewhere = command.segment(small, out / "o.tif", "--run-dir", disk / "run")
        elsewhere.refuses(disk / "run", "Read-only", "--run-dir", code=1)
    assert set(tree(out)) == {disk}


@pytest.mark.parametrize("size_k", [60, 120, 200, 264, 300])
def test_a_full_disk_ends_the_run_and_with_room_it_is_finished(
    command: Command, small: Path, out: Path, size_k: int
) -> None:
    """Exit 1 at once, not a night of tiles that fail; what the ledger says is true and kept."""
    whole = command.segment(small, out / "whole.tif", "--tile", 16)
    disk = out / "disk"
    with mounted(disk, f"size={size_k}k"):
        output = disk / "o.tif"
        answer = command.segment(small, output, "--tile", 16)
        answer.refuses(disk, "free the disk and run the same command again", code=1)
        assert not output.exists() or file_digest(output) == whole.manifest["output_sha256"]
        done = records(output)
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        again = command.segment(small, output, "--tile", 16)
        assert again.code == 0, again.err
        assert again.manifest["output_sha256"] == whole.manifest["output_sha256"]
        assert file_digest(output) == whole.manifest["output_sha256"]
        assert done.items() <= records(output).items()


def records(output: Path) -> dict[TileKey, float]:
    """Tiles done, with the seconds they took: a tile done twice would show."""
    found = LedgerFile(Path(f"{output}.run/ledger"), owner="test").records()
    return {k: r.seconds["compute"] for k, r in found.items() if r.status == "done"}


@pytest.mark.parametrize("limit", [1000, 3000, 5000, 8000, 20000])
def test_a_file_that_may_not_grow_ends_the_run_and_later_it_is_finished(
    command: Command, small: Path, out: Path, limit: int
) -> None:
    """The same through a quota: whatever file meets it first, plan, ledger, mask or report."""
    whole = command.segment(small, out / "whole.tif", "--tile", 32)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        answer = command.segment(small, out / "o.tif", "--tile", 32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    answer.refuses(out, "free the disk and run the same command again", code=1)
    assert not list(out.rglob("*.partial*"))
    assert not list(out.rglob("*.tmp"))
    assert not list((out / "o.tif.run" / "scratch").glob("*.tif"))
    again = command.segment(small, out / "o.tif", "--tile", 32)
    assert again.code == 0, again.err
    assert again.manifest["output_sha256"] == whole.manifest["output_sha256"]
