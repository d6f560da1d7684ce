from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import BundleError
from tests.scenes import fresh, texture, write_raster
from workflows.config import SegmentOptions
from workflows.segmenting import segment


def test_squeeze_and_excitation_runs_with_context_tile_and_is_never_called_exact(
    tmp_path: Path,
) -> None:
    """A MobileNetV3 could not run at all, or its seams would be promised away."""
    scene = write_raster(tmp_path / "scene.tif", texture((3, 128, 160), seed=3))
    fresh(tmp_path / "model", backbone="mobilenetv3-large")
    asked = SegmentOptions(backend="serial", tile=64, crf="off", precision="fp32")
    with pytest.raises(BundleError, match="SqueezeExcitation"):
        segment(scene, tmp_path / "mask.tif", model=tmp_path / "model", options=asked)
    options = SegmentOptions(backend="serial", tile=64, crf="off", precision="fp32", context="tile")
    manifest = segment(scene, tmp_path / "mask.tif", model=tmp_path / "model", options=options)
    assert manifest["status"] == "done"
    assert manifest["tiles"]["done"] == 6
    assert manifest["context"] == "tile"
    assert manifest["seam"]["exact"] is False


def test_a_network_with_a_decoder_is_segmented_without_seams(tmp_path: Path) -> None:
    """v3+ could be made, but its tiles not be stitched: low-level features would be shifted."""
    scene = write_raster(tmp_path / "scene.tif", texture((3, 150, 203), seed=4))
    fresh(tmp_path / "model", family="v3plus", output_stride=8)
    options = SegmentOptions(backend="serial", tile=64, crf="off", precision="fp32")
    manifest = segment(scene, tmp_path / "mask.tif", model=tmp_path / "model", options=options)
    assert manifest["seam"]["exact"] is True
    assert manifest["seam"]["passed"] is True
