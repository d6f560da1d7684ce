"""``--halo auto:TOL`` finds how far a network looks, by looking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Command
from scipy.ndimage import uniform_filter

from adapters.memory import MemorySource
from pipeline.domain import Grid, Halo, Pass, Reach, Region
from pipeline.errors import PlanError
from pipeline.models.frame import Frame
from pipeline.models.input_spec import Scaling
from pipeline.stitching.bound import upper_bound
from workflows.config import SegmentOptions
from workflows.halo_asked import halo_notes, reach_asked
from workflows.short_halo import Sampler, shortest_halo

EXACT = 64


class Blur:
    """A network that could look 64 px far and looks ``radius`` px: is the mean above 0?"""

    def __init__(self, radius: int) -> None:
        self.radius = radius

    def logits(self, image_CS: np.ndarray, frame: Frame, *, scored: Region) -> torch.Tensor:
        width = 2 * self.radius + 1
        mean_S = uniform_filter(image_CS[0].astype(np.float64), width, mode="constant")
        ends = tuple(a + n for a, n in zip(frame.origin, mean_S.shape, strict=True))
        kept_S = mean_S[scored.slices(within=Region(frame.origin, ends))]
        return torch.from_numpy(np.stack([kept_S, -kept_S]))


def sampler(radius: int, *, shape: tuple[int, ...] = (640, 640), valid: bool = True) -> Sampler:
    noise_CS = np.random.default_rng(1).normal(size=(1, *shape)).astype(np.float32)
    source = MemorySource(noise_CS, valid_S=np.full(shape, valid))
    grid = Grid(shape=shape, tile=tuple(min(160, n) for n in shape), stride=4)
    sweep = Pass(
        case="",
        name="segment",
        grid=grid,
        reach=Reach(stride=4, halo=Halo.uniform(EXACT, ndim=len(shape))),
        crf_halo=Halo.uniform(0, ndim=len(shape)),
    )
    return Sampler(
        source=source,
        channels=(0,),
        scaling=Scaling(type="z-score", mean=(0.0,), std=(1.0,)),
        predictor=Blur(radius),  # type: ignore[arg-type]
        sweep=sweep,
    )


@pytest.mark.parametrize(
    ("radius", "found"), [(0, 0), (3, 4), (7, 8), (15, 16), (30, 32), (47, 48)]
)
def test_the_shortest_halo_that_holds_what_the_network_looks_at_is_taken(
    radius: int, found: int
) -> None:
    """A shorter one has other labels along every border, a longer one is paid for in vain."""
    trial = shortest_halo(sampler(radius), tolerance=1e-3)
    assert trial is not None
    assert (trial.halo, trial.differ) == (found, 0)
    assert trial.upper_95 == upper_bound(0, trial.pixels) <= 1e-3


def test_a_tolerance_buys_a_shorter_halo_whose_labels_differ_by_no_more() -> None:
    """The bound of the share would not be what decides."""
    strict, loose = (shortest_halo(sampler(30), tolerance=t) for t in (1e-3, 0.2))
    assert strict is not None
    assert loose is not None
    assert loose.halo < strict.halo
    assert 0 < loose.differ / loose.pixels < loose.upper_95 <= 0.2


def test_a_network_that_uses_all_it_can_reach_keeps_its_exact_halo() -> None:
    """It would be cut where it is known to look."""
    assert shortest_halo(sampler(63), tolerance=1e-3) is None


def test_a_scene_of_one_tile_or_without_a_valid_pixel_has_nothing_to_measure() -> None:
    """A halo would be taken for good because nothing was compared."""
    assert shortest_halo(sampler(0, shape=(160, 160)), tolerance=1e-3) is None
    assert shortest_halo(sampler(0, valid=False), tolerance=1e-3) is None


def test_a_scene_cut_along_one_axis_is_measured_there() -> None:
    """Long strips, and scans cut into slabs, have borders, too."""
    trial = shortest_halo(sampler(7, shape=(152, 900)), tolerance=1e-3)
    assert trial is not None
    assert trial.halo == 8


@pytest.mark.parametrize("tolerance", [1e-7, 1e-320])
def test_a_tolerance_that_the_windows_cannot_show_is_refused(tolerance: float) -> None:
    """Zero of a hundred thousand says nothing of one in a million."""
    with pytest.raises(PlanError, match=f"auto:{tolerance:g}"):
        shortest_halo(sampler(0), tolerance=tolerance)


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], slim: Path
) -> Command:
    return Command(monkeypatch, capsys, slim)


def test_a_run_measures_once_and_says_what_it_took(
    command: Command, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rerun would measure again, perhaps choose otherwise, and start over."""
    output = tmp_path / "mask.tif"
    words: tuple[Any, ...] = ("--crf", "off", "--tile", 256, "--halo", "auto:0.05")
    first = command.segment(scene, output, *words).manifest
    halo = first["halo"]["before"][0]
    assert halo < 64
    assert not first["halo"]["exact"]
    assert any(f"halo {halo} px was measured" in note for note in first["notes"])
    monkeypatch.setattr("workflows.halo_asked.shortest_halo", None)
    again = command.segment(scene, output, *words)
    assert (again.code, again.manifest["fingerprint"]) == (0, first["fingerprint"])


def test_what_cannot_be_measured_is_refused_in_one_line(command: Command, scene: Path) -> None:
    """A typing error would become a halo."""
    for halo in ("auto", "auto:", "auto:0", "auto:2", "auto:x", "auto:nan", "-1"):
        command("plan", scene, "--model", command.model, "--halo", halo).refuses("--halo")
    answer = command(
        "plan", scene, "--model", command.model, "--halo", "auto:1e-3", "--context", "tile"
    )
    answer.refuses("--halo auto needs --context window")


def test_a_halo_off_the_stride_is_said_to_be_longer() -> None:
    """Who measures what 7 px cost would be shown the figures of 8."""
    exact = Reach(stride=4, halo=Halo.uniform(EXACT, ndim=2))
    said = {}
    for asked in ("7", "8"):
        options = SegmentOptions(halo=asked)
        reach = reach_asked(exact, options, None)
        assert reach.halo == Halo.uniform(8, ndim=2)
        said[asked] = halo_notes(None, options, reach=reach)
    assert said == {"7": ("--halo 7: 8 px, a multiple of the output stride",), "8": ()}
