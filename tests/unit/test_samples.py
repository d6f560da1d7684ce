"""Which places of a scene the certificate measures."""

from __future__ import annotations

import pytest

from pipeline.domain import Grid, Halo, Pass, Reach, Region, Sample, SamplePass
from pipeline.domain.sample import LOOKS, MARGIN, MOST_PAIRS, SHARE

REACH = Reach(stride=4, halo=Halo.uniform(64, ndim=2))
FLAT = Reach(stride=2, halo=Halo.uniform(32, ndim=3))

GRIDS = {
    "many tiles": Grid(shape=(9000, 7003), tile=(1024, 1024), stride=4),
    "four tiles": Grid(shape=(2048, 2048), tile=(1024, 1024), stride=4),
    "a last row of one pixel": Grid(shape=(1025, 70), tile=(1024, 72), stride=4),
    "tiles of two strides": Grid(shape=(5, 2000), tile=(8, 8), stride=4),
    "a volume": Grid(shape=(150, 77, 61), tile=(64, 64, 62), stride=2),
}


def samples_of(grid: Grid, *, seed: str = "a", crf: int = 0) -> SamplePass:
    ndim = len(grid.shape)
    reach = REACH if ndim == 2 else FLAT
    halo = Halo.uniform(crf, ndim=ndim)
    sweep = Pass(case="c", name="segment", grid=grid, reach=reach, crf_halo=halo)
    return SamplePass.of(sweep, reach=reach, seed=seed)


def pieces(grid: Grid, sample: Sample) -> int:
    return len(list(grid.parts(sample.region)))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_samples_come_in_pairs_astride_a_border_and_within_a_tile(grid: Grid) -> None:
    """Seams would be measured where there is none, or be held against another kind of place."""
    samples = samples_of(grid).samples
    assert samples
    whole = Region.whole(grid.shape)
    for seam, interior in zip(samples[::2], samples[1::2], strict=True):
        assert (seam.kind, interior.kind) == ("seam", "interior")
        assert seam.region in whole
        assert interior.region in whole
        assert pieces(grid, seam) > 1
        assert pieces(grid, interior) == 1
        assert interior.region.size >= seam.region.size
    assert len({sample.region for sample in samples}) == len(samples)


def test_corners_and_each_axis_have_their_turn() -> None:
    """A fault of one axis would never be met."""
    grid = GRIDS["many tiles"]
    seams = [s.region for s in samples_of(grid).samples if s.kind == "seam"]
    crossed = [
        tuple(a // t != (b - 1) // t for a, b, t in zip(r.start, r.stop, grid.tile, strict=True))
        for r in seams
    ]
    assert len(seams) == MOST_PAIRS
    assert (True, True) in crossed
    assert (True, False) in crossed
    assert (False, True) in crossed


def test_samples_follow_from_the_grid_and_the_seed_alone() -> None:
    """A resumed run would look for samples at other places than those that tiles kept."""
    grid = GRIDS["many tiles"]
    assert samples_of(grid) == samples_of(grid)
    other = samples_of(grid, seed="b").samples
    assert other[:2] == samples_of(grid).samples[:2], "the first pair lies in the middle"
    assert other[2:] != samples_of(grid).samples[2:]


def test_samples_read_little_and_one_pair_in_any_case() -> None:
    """The certificate would cost as much as the run; or a small scene would have none."""
    for name in ("many tiles", "four tiles"):
        found = samples_of(GRIDS[name])
        assert found.read_voxels <= SHARE * Region.whole(GRIDS[name].shape).size
    assert len(samples_of(GRIDS["four tiles"])) == 4
    assert len(samples_of(Grid(shape=(130, 100), tile=(128, 100), stride=4))) == 2


def test_one_tile_has_no_samples() -> None:
    """A scene without seams would be computed twice."""
    assert len(samples_of(Grid(shape=(90, 70), tile=(92, 72), stride=4))) == 0


def test_a_sample_reads_more_than_a_tile_would_around_it() -> None:
    """A halo derived one stride short would be short on both sides, and show nowhere."""
    grid = GRIDS["many tiles"]
    found = samples_of(grid, crf=10)
    tile = found.tile(0)
    region = found.samples[0].region
    assert tile.core == region
    assert region.grow(Halo.uniform(20, ndim=2)) in tile.scored
    assert tile.scored.grow(Halo.uniform(64 + MARGIN * 4, ndim=2)) in tile.read
    assert tile.key == ("c", "certify", 0)


def among(chosen: tuple[int, ...], wanted: Region, *, seed: str = "a") -> tuple[Sample, ...]:
    """Samples in these tiles of four by four, where they meet ``wanted``."""
    grid = Grid(shape=(4000, 4000), tile=(1000, 1000), stride=4)
    halo = Halo.uniform(0, ndim=2)
    sweep = Pass(case="c", name="segment", grid=grid, reach=REACH, crf_halo=halo, chosen=chosen)
    found = SamplePass.of(sweep, reach=REACH, seed=seed, wanted=lambda at: bool((at & wanted).size))
    assert found == SamplePass.of(
        sweep, reach=REACH, seed=seed, wanted=lambda at: bool((at & wanted).size)
    )
    for sample in found.samples:
        assert {*grid.meeting(sample.region)} <= {*chosen}
        assert (sample.region & wanted).size
    return found.samples


def test_where_few_tiles_run_samples_lie_astride_two_of_them_and_where_labels_are() -> None:
    """What no tile has said would be compared, or what gets no label."""
    field = Region((1100, 1500), (1900, 2600))
    samples = among((5, 6), field)
    assert [sample.kind for sample in samples] == ["seam", "interior"] * (len(samples) // 2)
    assert len(samples) >= 2
    assert all(s.region.start[1] < 2000 < s.region.stop[1] for s in samples if s.kind == "seam")
    assert among((5, 6), field, seed="b") != samples


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        ((5,), Region((1000, 1000), (2000, 2000))),
        ((0, 2, 8, 15), Region((0, 0), (4000, 4000))),
        ((5, 6), Region((1100, 1100), (1300, 1300))),
    ],
    ids=["one tile", "tiles apart", "labels in one of two"],
)
def test_where_no_two_tiles_with_labels_meet_nothing_is_measured(
    chosen: tuple[int, ...], wanted: Region
) -> None:
    """A certificate would rest on places that are no seam."""
    assert among(chosen, wanted) == ()


def test_where_pixels_are_few_samples_lie_where_both_tiles_have_some() -> None:
    """A scene that is mostly nodata would get no verdict, or one on a seam with one side."""
    grid, looks = GRIDS["many tiles"], []
    sweep = Pass(case="c", name="segment", grid=grid, reach=REACH, crf_halo=Halo.uniform(0, ndim=2))
    swath = Region((500, 5900), (2100, 6700))

    def found(valid: Region) -> SamplePass:
        def wanted(region: Region) -> bool:
            looks.append(region)
            return bool((region & valid).size)

        return SamplePass.of(sweep, reach=REACH, seed="a", wanted=wanted)

    few = found(swath).samples
    assert {sample.kind for sample in few} == {"seam", "interior"}
    for sample in few:
        assert all((part & swath).size for part in grid.parts(sample.region))
    assert found(Region.whole(grid.shape)) == samples_of(grid), "where all is valid as ever"
    for valid in (Region((0, 0), (0, 0)), Region((1500, 1500), (1508, 1508))):
        looks.clear()
        assert not found(valid).samples
        assert len(looks) == LOOKS, "a scene that is nearly empty would be looked through for ever"
