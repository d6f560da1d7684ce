"""Promise 1: another tile size changes a label only where the two best logits nearly tie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.uri import open_source
from adapters.zarr_store import ZarrStore
from pipeline.domain import Grid, Region
from pipeline.inference.normalise import normalise
from pipeline.inference.padding import read_padded
from pipeline.models.bundle import load_bundle
from pipeline.models.frame import Frame
from workflows.config import SegmentOptions
from workflows.segmenting import segment

TIE = 1e-3  # of the logits' deviation


def whole_pass(source_path: Path, bundle_path: Path) -> np.ndarray:
    """(K, *S) logits of one plain forward over the whole padded scene: the oracle."""
    source, bundle = open_source(str(source_path)), load_bundle(bundle_path)
    shape = source.info.shape
    stride = bundle.architecture.output_stride
    padded = Grid(shape=shape, tile=(stride,) * len(shape), stride=stride).padded_shape
    block = read_padded(source, Region.whole(padded))
    image_BCS = torch.from_numpy(normalise(block, bundle.input.scaling)).unsqueeze(0)
    with torch.inference_mode():
        logits_KS = bundle.network()(image_BCS, Frame((0,) * len(shape), padded))[0].numpy()
    return logits_KS[(slice(None), *(slice(0, n) for n in shape))]


def differing(output: Path, logits_KS: np.ndarray) -> tuple[int, int]:
    """Labels that differ from the whole pass: all of them, and those that are no near tie."""
    labels_S = ZarrStore(Path(f"{output}.run/mask.zarr")).read(Region.whole(logits_KS.shape[1:]))
    best = np.sort(logits_KS, axis=0)
    tie_S = best[-1] - best[-2] <= TIE * logits_KS.std()
    wrong_S = (labels_S != logits_KS.argmax(axis=0)) & (labels_S != 255)
    return int(wrong_S.sum()), int((wrong_S & ~tie_S).sum())


@pytest.mark.parametrize("tile", [256, 512, 1024])
def test_a_raster_tiled_equals_one_pass_over_the_scene(
    scene: Path, slim: Path, tmp_path: Path, tile: int
) -> None:
    """A halo one stride short, or an origin off the stride, shows here."""
    output = tmp_path / "o.tif"
    asked = SegmentOptions(
        backend="serial", tracking_uri="none", precision="fp32", crf="off", tile=tile
    )
    manifest = segment(scene, output, model=slim, options=asked)
    assert manifest["halo"]["exact"]
    total, beyond = differing(output, whole_pass(scene, slim))
    print(f"tile {tile}: {total} labels differ, {beyond} of them are no near tie")
    assert beyond == 0
    assert total < 20


@pytest.mark.parametrize("tile", [32, 64, 128])
def test_a_volume_tiled_equals_one_pass_over_the_scan(
    volume: Path, slim3d: Path, tmp_path: Path, tile: int
) -> None:
    """The same in three dimensions."""
    output = tmp_path / "o.nii.gz"
    asked = SegmentOptions(
        backend="serial", tracking_uri="none", precision="fp32", crf="off", tile=tile
    )
    segment(volume, output, model=slim3d, options=asked)
    total, beyond = differing(output, whole_pass(volume, slim3d))
    print(f"tile {tile}: {total} labels differ, {beyond} of them are no near tie")
    assert beyond == 0
    assert total < 20


def test_a_halo_chosen_short_is_said_to_be_inexact_and_does_change_labels(
    scene: Path, slim: Path, tmp_path: Path
) -> None:
    """The check above can fail: without a halo, labels at the seams do differ."""
    output = tmp_path / "o.tif"
    asked = SegmentOptions(
        backend="serial", tracking_uri="none", precision="fp32", crf="off", tile=128, halo="0"
    )
    manifest = segment(scene, output, model=slim, options=asked)
    assert not manifest["halo"]["exact"]
    _, beyond = differing(output, whole_pass(scene, slim))
    assert beyond > 1000
