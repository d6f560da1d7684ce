"""Canonical windows, from source to store: the tile does not show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zarr

from pipeline.errors import PlanError
from pipeline.models.architecture import Architecture
from pipeline.models.bundle import load_bundle
from pipeline.models.fresh import new_bundle
from workflows.config import SegmentOptions
from workflows.segmenting import plan, segment
from workflows.sizing import canonical_side


def options(**changes: object) -> SegmentOptions:
    values = {"backend": "serial", "tracking_uri": "none", "crf": "off", "windows": "canonical"}
    return SegmentOptions.model_validate(values | changes)


def stores(source: Path, output: Path, model: Path, asked: SegmentOptions) -> tuple[Any, Any]:
    """The mask, and the scores in float16."""
    manifest = segment(source, output, model=model, options=asked)
    assert manifest["windows"]["kind"] == asked.windows
    names = ("mask", "scores")
    mask, scores = (zarr.open_array(f"{output}.run/{name}.zarr", mode="r")[:] for name in names)
    return mask, scores


@pytest.mark.parametrize(("dims", "tiles"), [(2, (256, 512)), (3, (32, 64))])
def test_stores_of_another_tile_hold_the_same_bytes(
    dims: int, tiles: tuple[int, int], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """What comes after the network, or the windows that a plan hands to it, would let it show."""
    source = request.getfixturevalue("scene" if dims == 2 else "volume")
    model = request.getfixturevalue("slim" if dims == 2 else "slim3d")
    suffix = "tif" if dims == 2 else "nii.gz"
    found = {}
    for windows in ("canonical", "rows"):
        for tile in tiles:
            output = tmp_path / f"{windows}{tile}.{suffix}"
            asked = options(windows=windows, tile=tile, precision="fp32", scores="float16")
            found[windows, tile] = stores(source, output, model, asked)
    for first, second in zip(*(found["canonical", tile] for tile in tiles), strict=True):
        assert np.array_equal(first, second)
    # Rows of the tile differ in some bit: equal scores above mean something.
    assert not np.array_equal(*(found["rows", tile][1] for tile in tiles))


def test_the_plan_says_what_canonical_windows_are(scene: Path, slim: Path) -> None:
    """One could not tell, before the run or after it, whether two files may be compared."""
    canonical = plan(scene, model=slim, options=options())
    assert canonical["windows"] == {
        "kind": "canonical",
        "side_px": 256,
        "features": None,
        "maps": "device",
        "same_bytes_for_any_tile": True,
    }
    rows = plan(scene, model=slim, options=options(windows="rows"))
    assert (rows["windows"]["kind"], rows["windows"]["same_bytes_for_any_tile"]) == ("rows", False)
    assert rows["windows"]["features"] == rows["resolved"]["window"] == 64
    assert rows["fingerprint"] != canonical["fingerprint"]
    assert rows["request_digest"] != canonical["request_digest"]
    sides = zip(canonical["tile"], canonical["shape"], strict=True)
    assert all(side % 256 == 0 or side >= length for side, length in sides)


def test_a_crf_per_tile_takes_the_promise_back(scene: Path, slim: Path, tmp_path: Path) -> None:
    """The plan would promise equal bytes, and the seams of the CRF break it."""
    smoothness = {"weight": 3, "position": 3}
    crf = tmp_path / "crf.yaml"
    crf.write_text(yaml.safe_dump({"iterations": 3, "smoothness": smoothness}))
    windows = plan(scene, model=slim, options=options(crf=str(crf)))["windows"]
    assert (windows["kind"], windows["same_bytes_for_any_tile"]) == ("canonical", False)


def test_canonical_windows_are_refused_where_the_tile_shows_anyway(
    slim: Path, tmp_path: Path
) -> None:
    """The plan would promise the same bytes for any tile, and a mean over the tile break it."""
    pooled = Architecture(
        family="v3", backbone="slim", dims=2, output_stride=8, rates=(1,), image_pooling=True
    )
    bundle = new_bundle(tmp_path / "pooled", architecture=pooled, bands=1, classes=2, seed=0)
    with pytest.raises(PlanError, match="--context tile"):
        canonical_side(options(context="tile"), bundle)
    assert canonical_side(options(), bundle) == 256
    assert canonical_side(options(context="tile"), load_bundle(slim)) == 256  # pools nothing
    assert canonical_side(options(windows="rows", context="tile"), bundle) is None
