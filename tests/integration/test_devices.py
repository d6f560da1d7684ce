"""The same on every device that is here: the CPU always, a GPU where torch sees one.

The oracle is the plain module in one pass on the CPU, and the CRF's engine there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import fresh, texture, write_raster

from pipeline.crf.engine import Pairwise, engine_named
from pipeline.domain import Region
from pipeline.inference.precision import Precision
from pipeline.inference.predictor import Predictor
from pipeline.models.frame import Frame
from workflows.config import SegmentOptions
from workflows.segmenting import segment

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_GPU)]
FP32 = Precision(name="fp32", channels_last=True, why="")
NETWORKS = {
    "slim": ({"backbone": "slim"}, (203, 301)),
    "resnet18": ({"backbone": "resnet18"}, (401, 307)),
    "slim 3-D": ({"dims": 3}, (29, 38, 33)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NETWORKS)
def test_windows_give_the_logits_of_one_pass_on_the_cpu(
    tmp_path: Path, name: str, device: str
) -> None:
    """A device whose kernels round to fewer bits, or that was handed another scene, would pass."""
    changes, size = NETWORKS[name]
    bundle = fresh(tmp_path / "b", **changes)
    with torch.inference_mode():
        network = bundle.network()
        shape = tuple(-(-side // network.stride) * network.stride for side in size)
        image_CS = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
        frame, whole = Frame((0,) * len(shape), shape), Region.whole(shape)
        exact_KS = network(torch.from_numpy(image_CS)[None], frame)[0]
    found = [
        Predictor(
            bundle, device=device, precision=FP32, context="window", threads=1, window=12,
            hosted=hosted,
        ).logits(image_CS, frame, scored=whole).cpu()
        for hosted in (False, True)
    ]  # fmt: skip
    assert torch.equal(found[0], found[1])  # wherever maps lie
    assert (found[0] - exact_KS).abs().max() <= 1e-3 * exact_KS.std()


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_command_gives_the_same_bytes_again(tmp_path: Path, device: str) -> None:
    """Kernels that add in the order in which they end would give every run another mask."""
    image_CYX = np.stack([texture((300, 400), seed=seed) for seed in range(3)])
    scene = write_raster(tmp_path / "scene.tif", image_CYX)
    fresh(tmp_path / "b", backbone="resnet18")
    crf = tmp_path / "crf.yaml"
    crf.write_text("engine: torch\nsmoothness: {weight: 3, position: 3}\n")
    asked = SegmentOptions(
        device=device, backend="serial", tile=128, crf=str(crf), tracking_uri="none"
    )
    masks = [tmp_path / f"mask{number}.tif" for number in range(2)]
    for mask in masks:
        segment(scene, mask, model=tmp_path / "b", options=asked)
    assert masks[0].read_bytes() == masks[1].read_bytes()


@pytest.mark.parametrize("device", DEVICES)
def test_the_crf_of_a_device_gives_what_that_of_the_cpu_gives(device: str) -> None:
    """A lattice whose vertices are found by other rounding gives other neighbours."""
    pytest.importorskip("pydensecrf.densecrf", reason="the extra 'crf' is not installed")
    rng = np.random.default_rng(0)
    places_SN = np.indices((60, 70)).reshape(2, -1).astype(np.float32)
    colour_DN = np.concatenate([places_SN / np.float32(20), rng.random((3, 4200), np.float32) * 4])
    kernels = [
        Pairwise(features_DN=places_SN / np.float32(3), compatibility=3.0),
        Pairwise(features_DN=colour_DN, compatibility=4.0),
    ]
    energy_KN = rng.random((6, 4200), np.float32)
    exact_KN = engine_named("pydensecrf", device="cpu", threads=1).mean_field(
        energy_KN, kernels, iterations=10
    )
    engine = engine_named("torch", device=device, threads=1)
    found = [engine.mean_field(energy_KN, kernels, iterations=10) for _ in range(2)]
    assert np.array_equal(found[0], found[1])
    assert np.abs(found[0] - exact_KN).max() <= 1e-3
