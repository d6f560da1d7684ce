"""The vocabulary under arbitrary shapes: cores, boxes, and what a network's output needs."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.domain import ContextWindow, Grid, Halo, Pass, Reach, Region
from pipeline.errors import RegionError

ranks = st.integers(2, 3)
unhurried = settings(deadline=None)  # a busy machine is not a failed property


def tuples(values: st.SearchStrategy[int], ndim: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[values] * ndim)


def halos(ndim: int, *, widest: int = 12) -> st.SearchStrategy[Halo]:
    sides = tuples(st.integers(0, widest), ndim)
    return st.builds(Halo, sides, sides)


@st.composite
def grids(draw: st.DrawFn, *, ndim: int | None = None) -> Grid:
    ndim = draw(ranks) if ndim is None else ndim
    stride = draw(st.sampled_from([1, 2, 4, 8]))
    shape = draw(tuples(st.integers(1, 40 if ndim == 2 else 14), ndim))
    tile = draw(tuples(st.integers(1, 5), ndim))
    grid = Grid(shape=shape, tile=tuple(t * stride for t in tile), stride=stride)
    assume(len(grid) <= 300)
    return grid


@st.composite
def regions(draw: st.DrawFn, ndim: int) -> Region:
    start = draw(tuples(st.integers(-20, 20), ndim))
    sides = draw(tuples(st.integers(0, 15), ndim))
    return Region(start, tuple(a + n for a, n in zip(start, sides, strict=True)))


def voxels(region: Region) -> set[tuple[int, ...]]:
    return set(
        itertools.product(*(range(a, b) for a, b in zip(region.start, region.stop, strict=True)))
    )


@unhurried
@given(grids())
def test_cores_are_disjoint_and_cover_the_scene(grid):
    """A pixel written twice or never: a race, or a hole in the mask."""
    cores = [voxels(core) for core in grid.cores()]
    assert sum(map(len, cores)) == math.prod(grid.shape)
    assert set().union(*cores) == voxels(Region.whole(grid.shape))
    assert all(cores)


@unhurried
@given(st.data())
def test_one_pixel_tiles_at_stride_one_are_the_pixels_in_row_major_order(data):
    """The number of a tile is part of the ledger's key; another order would mix up runs."""
    shape = data.draw(ranks.flatmap(lambda n: tuples(st.integers(1, 6), n)))
    grid = Grid(shape=shape, tile=(1,) * len(shape), stride=1)
    assert [core.start for core in grid.cores()] == sorted(voxels(Region.whole(shape)))


@unhurried
@given(grids())
def test_the_padded_scene_is_the_smallest_valid_one_that_holds_the_scene(grid):
    """More padding would move the zero-padded border, and with it the result."""
    for length, padded in zip(grid.shape, grid.padded_shape, strict=True):
        assert length <= padded < length + grid.stride
        assert padded % grid.stride == 0


@unhurried
@given(grids())
def test_a_core_outside_the_grid_cannot_be_asked_for(grid):
    """A wrong number would otherwise wrap to a tile that someone else writes."""
    for number in (-1, len(grid)):
        with pytest.raises(RegionError):
            grid.core(number)


@unhurried
@given(grids(), st.data())
def test_core_lies_in_scored_in_read_in_the_padded_scene_on_the_stride(grid, data):
    """A tile off the stride, or short of its halo, would see other features than the scene."""
    ndim, stride = len(grid.shape), grid.stride
    window = data.draw(st.none() | windows(ndim, stride=stride))
    reach = Reach(stride=stride, halo=data.draw(halos(ndim)), window=window)
    crf_halo = data.draw(halos(ndim))
    sweep = Pass(case="a", name="segment", grid=grid, reach=reach, crf_halo=crf_halo)
    whole = Region.whole(grid.padded_shape)
    for tile in itertools.islice(sweep.tiles(), 40):
        assert tile.core in tile.scored
        assert tile.scored in tile.read
        assert tile.read in whole
        assert tile.core.grow(crf_halo).clip(grid.shape) in tile.scored
        assert tile.scored.grow(reach.halo).clip(grid.padded_shape) in tile.read
        for edge in tile.scored.start + tile.scored.stop + tile.read.start + tile.read.stop:
            assert edge % stride == 0
    assert sweep.read_ratio >= 1


@unhurried
@given(grids(), st.data())
def test_kinds_stand_for_all_tiles(grid, data):
    """The work and the memory of a plan would be those of other tiles than its own."""
    ndim, stride = len(grid.shape), grid.stride
    reach = Reach(stride=stride, halo=data.draw(halos(ndim)), window=None)
    some = st.sets(st.integers(0, len(grid) - 1), min_size=1).map(lambda s: tuple(sorted(s)))
    chosen = data.draw(st.none() | some)
    sweep = Pass(
        case="a", name="a", grid=grid, reach=reach, crf_halo=data.draw(halos(ndim)), chosen=chosen
    )
    assume(len(sweep) <= 2000)
    assert [t.key.number for t in sweep.tiles()] == list(chosen or range(len(grid)))
    assert sweep.covered_pixels == sum(t.core.size for t in sweep.tiles())
    kinds = list(sweep.kinds())
    assert sum(alike for _, alike in kinds) == len(sweep)
    assert sum(alike * t.read.size for t, alike in kinds) == sum(t.read.size for t in sweep.tiles())
    assert {t.read.shape for t, _ in kinds} == {t.read.shape for t in sweep.tiles()}


@unhurried
@given(ranks.flatmap(lambda n: st.tuples(regions(n), regions(n))))
def test_and_or_and_contains_are_those_of_sets_of_voxels(pair):
    """Every crop and every read rests on them."""
    a, b = pair
    assert voxels(a & b) == voxels(a) & voxels(b)
    assert voxels(a & b) == voxels(b & a)
    assert (a & b) in b
    assert voxels(a) | voxels(b) <= voxels(a | b)
    assert a in (a | b)
    assert b in (a | b)
    if voxels(a):
        assert (a in b) == (voxels(a) <= voxels(b))
    assert a.size == len(voxels(a))


@unhurried
@given(ranks.flatmap(lambda n: st.tuples(regions(n), tuples(st.integers(1, 20), n))))
def test_clip_keeps_what_lies_in_the_image(pair):
    """A read outside the file would fail, or return fill values as data."""
    region, shape = pair
    clipped = region.clip(shape)
    assert voxels(clipped) == voxels(region) & voxels(Region.whole(shape))
    assert clipped in Region.whole(shape)


@unhurried
@given(ranks.flatmap(lambda n: st.tuples(regions(n), halos(n), halos(n))))
def test_growing_by_two_halos_is_growing_by_their_sum(triple):
    """Halos of stages, of the CRF and of the context window are added up."""
    region, first, second = triple
    assert region.grow(first).grow(second) == region.grow(first + second)
    assert region.grow(first) in region.grow(first | second)
    assert region.grow(first | second) == region.grow(first) | region.grow(second)


@unhurried
@given(ranks.flatmap(regions), st.integers(1, 9))
def test_align_is_the_smallest_box_on_the_stride(region, stride):
    """A larger one costs work; a smaller one loses context."""
    aligned = region.align(stride)
    assert region in aligned
    for a, b, low, high in zip(region.start, region.stop, aligned.start, aligned.stop, strict=True):
        assert low % stride == high % stride == 0
        assert a - low < stride
        assert high - b < stride
    assert aligned.align(stride) == aligned


@unhurried
@given(ranks.flatmap(lambda n: st.tuples(regions(n), halos(n))))
def test_slices_find_a_box_in_the_array_that_holds_a_larger_one(pair):
    """An index off by the halo shifts the mask."""
    region, halo = pair
    outer = region.grow(halo)
    index = region.slices(within=outer)
    for (a, b), part, first in zip(
        zip(region.start, region.stop, strict=True), index, outer.start, strict=True
    ):
        assert (part.start + first, part.stop + first) == (a, b)
    grown = region.grow(Halo.uniform(1, ndim=region.ndim))
    with pytest.raises(RegionError):
        grown.slices(within=region)


@unhurried
@given(ranks.flatmap(lambda n: st.tuples(regions(n), tuples(st.integers(1, 6), n))))
def test_blocks_cut_a_box_without_overlap_or_hole(pair):
    """Statistics and finish stream over blocks: each voxel once."""
    region, shape = pair
    blocks = list(region.blocks(shape))
    assert sum(block.size for block in blocks) == region.size
    assert set().union(*map(voxels, blocks)) == voxels(region)
    for block in blocks:
        assert all(0 < n <= most for n, most in zip(block.shape, shape, strict=True))


@unhurried
@given(ranks.flatmap(halos), st.integers(1, 9))
def test_rounding_a_halo_up_adds_less_than_a_stride(halo, stride):
    """A halo rounded down is short of the receptive field."""
    rounded = halo.round_up(stride)
    for a, b in zip(halo.before + halo.after, rounded.before + rounded.after, strict=True):
        assert b % stride == 0
        assert a <= b < a + stride


@st.composite
def windows(draw: st.DrawFn, ndim: int, *, stride: int) -> ContextWindow:
    odd = draw(tuples(st.integers(0, 4), ndim))
    return ContextWindow(
        size=tuple((2 * n + 1) * stride for n in odd),
        steps=(stride,) * ndim,
        inner=draw(halos(ndim, widest=9)),
        outer=draw(halos(ndim, widest=9)),
    )


def brute_force_reach(
    region: Region, window: ContextWindow, *, stride: int, shape: tuple[int, ...]
) -> set[tuple[int, ...]]:
    """All input pixels that the windows of all features behind ``region`` look at."""
    seen: set[tuple[int, ...]] = set()
    behind = [
        {pixel // stride for pixel in range(max(a - before, 0), min(b + after, length))}
        for a, b, before, after, length in zip(
            region.start,
            region.stop,
            window.inner.before,
            window.inner.after,
            shape,
            strict=True,
        )
    ]
    for place in itertools.product(*behind):
        pooled = []
        for feature, size, length, before, after in zip(
            place, window.size, shape, window.outer.before, window.outer.after, strict=True
        ):
            features, across = length // stride, size // stride
            across = min(across, features)
            first = feature - size // stride // 2
            first = max(0, min(first, features - across))
            low, high = first * stride - before, (first + across) * stride + after
            pooled.append(range(max(low, 0), min(high, length)))
        seen |= set(itertools.product(*pooled))
    return seen


@unhurried
@given(st.data())
def test_the_reach_of_a_context_window_is_the_union_of_its_shifted_windows(data):
    """A window short of its features moves every label under it; a larger one wastes reads."""
    ndim = data.draw(ranks)
    stride = data.draw(st.sampled_from([1, 2, 4]))
    cells = data.draw(tuples(st.integers(1, 10 if ndim == 2 else 4), ndim))
    shape = tuple(n * stride for n in cells)
    start = data.draw(st.tuples(*(st.integers(0, n - 1) for n in shape)))
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True))
    window = data.draw(windows(ndim, stride=stride))
    region = Region(start, stop)
    found = window.reach(region, shape=shape)
    expected = brute_force_reach(region, window, stride=stride, shape=shape)
    assert expected <= voxels(found)
    for axis in range(ndim):
        along = [place[axis] for place in expected]
        assert (found.start[axis], found.stop[axis]) == (min(along), max(along) + 1)
    assert found in Reach(stride=stride, halo=Halo.uniform(0, ndim=ndim), window=window).read(
        region, shape=shape
    )


def test_far_from_the_border_the_window_reaches_half_its_size_to_either_side():
    """``plan`` prints this halo; it must be what is read."""
    inner, outer = Halo((8, 0), (8, 0)), Halo((3, 4), (5, 6))
    window = ContextWindow(size=(24, 40), steps=(8, 8), inner=inner, outer=outer)
    reach = Reach(stride=8, halo=Halo.uniform(2, ndim=2), window=window)
    region = Region((800, 800), (864, 864))
    assert reach.read(region, shape=(1600, 1600)) == region.grow(reach.halo_with_window)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Halo((1,), (1, 2)),
        lambda: Halo((-1, 0), (0, 0)),
        lambda: Region((3, 0), (2, 5)),
        lambda: Region((0, 0), (1,)),
        lambda: Region((), ()),
        lambda: Grid(shape=(4, 4), tile=(3, 4), stride=2),
        lambda: Grid(shape=(4, 4), tile=(0, 4), stride=2),
        lambda: Grid(shape=(4, 0), tile=(2, 2), stride=2),
        lambda: Grid(shape=(4, 4, 4), tile=(2, 2), stride=2),
        lambda: Grid(shape=(4, 4), tile=(4, 4), stride=0),
        lambda: Grid(shape=(4, 4), tile=(4, 4), stride=-2),
        lambda: Reach(stride=0, halo=Halo.uniform(1, ndim=2)),
        lambda: Pass(
            case="a", name="a", grid=Grid(shape=(4, 4), tile=(2, 2), stride=2),
            reach=Reach(stride=2, halo=Halo.uniform(1, ndim=2)),
            crf_halo=Halo.uniform(0, ndim=2), chosen=(),
        ),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_not_built(build):
    """It would surface later as a wrong crop, far from its cause."""
    with pytest.raises(RegionError):
        build()
