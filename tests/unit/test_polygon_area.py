"""Polygons over pixels, asked region by region, against rasterio over the whole scene."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import shapely
from polygons import inside

from adapters.polygon_area import BLOCK, PolygonArea
from pipeline.domain import Region

SHAPE = (1100, 1300)
WHOLE = Region.whole(SHAPE)


def area_of(*polygons: object) -> PolygonArea:
    return PolygonArea(tuple(shapely.to_wkb(one) for one in polygons), SHAPE, "digest")


def star(centre: tuple[float, float], *, reach: float, seed: int) -> shapely.Polygon:
    """A crooked polygon of 40 corners."""
    rng = np.random.default_rng(seed)
    angles, radii = np.sort(rng.uniform(0, 2 * np.pi, 40)), rng.uniform(0.2, 1.0, 40) * reach
    return shapely.Polygon(np.stack([np.cos(angles), np.sin(angles)], -1) * radii[:, None] + centre)


def regions(count: int) -> list[Region]:
    rng = np.random.default_rng(5)
    starts = rng.integers(0, (SHAPE[0] - 1, SHAPE[1] - 1), (count, 2))
    stops = np.minimum(starts + rng.integers(1, 700, (count, 2)), SHAPE)
    return [
        Region(tuple(a), tuple(b)) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)
    ]


POLYGONS = {
    "a crooked one": [star((700, 500), reach=480, seed=1)],
    "many, some past the border": [
        star((300 * column - 40, 260 * row - 40), reach=150, seed=row)
        for column in range(5)
        for row in range(5)
    ],
    "one with a hole over whole blocks": [
        shapely.box(-10, -10, 1290.4, 1090.6).difference(shapely.box(510, 510, 1030, 1030))
    ],
    "small ones that miss every centre, but one": [
        shapely.box(10.6, 10.6, 11.4, 11.4), shapely.box(900.4, 20.4, 900.6, 20.6),
    ],
}  # fmt: skip


@pytest.mark.parametrize("polygons", POLYGONS.values(), ids=POLYGONS)
def test_any_region_has_the_pixels_that_rasterio_finds_at_once(polygons: list[object]) -> None:
    """A block would lie elsewhere, or a polygon cut at its border show a line there."""
    area, wanted = area_of(*polygons), inside(SHAPE, *polygons)
    assert wanted.any()
    assert np.array_equal(area.inside(WHOLE), wanted)
    for region in regions(30):
        part = wanted[region.slices(within=WHOLE)]
        assert np.array_equal(area.inside(region), part)
        assert area.touches(region) == part.any()
    outside = wanted.copy()
    outside[area.bounds.slices(within=WHOLE)] = False
    assert not outside.any()


def test_a_centre_on_an_edge_falls_on_one_side_whichever_region_asks() -> None:
    """Tiles of another size would give another pixel: canonical windows promise the same bytes."""
    thirds = shapely.Polygon([(0.5, 0.5), (1200.5, 400.5), (300.5, 1000.5)])
    area = area_of(thirds, star((640, 512), reach=500, seed=3))
    whole = area.inside(WHOLE)
    for region in [*regions(60), *WHOLE.blocks((BLOCK // 2, 96))]:
        assert np.array_equal(area.inside(region), whole[region.slices(within=WHOLE)])


def test_a_worker_gets_the_same_area_and_nothing_that_was_built_of_it() -> None:
    """Each message to a worker would carry the index as well."""
    area = area_of(*POLYGONS["a crooked one"])
    fresh = len(pickle.dumps(area))
    wanted = area.inside(WHOLE)
    found = pickle.loads(pickle.dumps(area))
    assert np.array_equal(found.inside(WHOLE), wanted)
    assert len(pickle.dumps(area)) == fresh


def test_no_polygon_has_no_pixel() -> None:
    """A scene that no polygon is near would be a crash instead of a refusal."""
    area = area_of()
    assert not area.touches(area.bounds)
    assert not area.touches(WHOLE)
