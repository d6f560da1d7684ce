"""The FCN baseline is torchvision's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import fresh
from torch import nn
from torchvision.models.segmentation import fcn_resnet50
from torchvision.models.segmentation.fcn import FCNHead

from pipeline.domain import Region
from pipeline.errors import BundleError
from pipeline.inference.precision import Precision
from pipeline.inference.predictor import Predictor
from pipeline.models.architecture import Architecture
from pipeline.models.bundle import save_bundle
from pipeline.models.deeplab import build_network
from pipeline.models.frame import Frame
from pipeline.models.published import published


def test_an_fcn_gives_torchvisions_logits_in_windows(tmp_path: Path) -> None:
    """The baseline would be another network than the one that is published."""
    torch.manual_seed(3)
    theirs = fcn_resnet50(weights=None, weights_backbone=None, num_classes=4).eval()
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, 0, 0.3)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    other = fresh(tmp_path / "slim")
    asked = replace(other, architecture=published("fcn", "resnet50"))
    bundle = save_bundle(tmp_path / "b", asked, theirs.state_dict())
    image_CS = np.random.default_rng(0).normal(size=(3, 88, 120)).astype(np.float32)
    predictor = Predictor(
        bundle,
        device="cpu",
        precision=Precision(name="fp32", channels_last=True, why="test"),
        context="window",
        threads=1,
        window=16,
    )
    whole = Region.whole((88, 120))
    with torch.inference_mode():
        want_KS = theirs(torch.from_numpy(image_CS)[None])["out"][0]
        got_KS = predictor.logits(image_CS, Frame.of(whole, shape=whole.shape), scored=whole)
    assert (got_KS - want_KS).abs().max() < 1e-5 * want_KS.std()


@pytest.mark.parametrize(
    ("backbone", "count"), [("resnet50", 35_322_218), ("resnet101", 54_314_346)]
)
def test_an_fcn_has_as_many_parameters_as_published(backbone: str, count: int) -> None:
    """A layer would be missing: torchvision's figures, the auxiliary classifier counted."""
    with torch.device("meta"):
        network = build_network(published("fcn", backbone), bands=3, classes=21)
        auxiliary = FCNHead(1024, 21)
    parts = (*network.parameters(), *auxiliary.parameters())
    assert sum(weight.numel() for weight in parts) == count


@pytest.mark.parametrize("changes", [{"rates": (1,)}, {"backbone": "mobilenetv3-large"}])
def test_an_fcn_has_nothing_but_its_trunk_to_choose(changes: dict[str, object]) -> None:
    """What a bundle states would be used by nothing."""
    values: dict[str, object] = {
        "family": "fcn",
        "backbone": "resnet50",
        "dims": 2,
        "output_stride": 16,
        "rates": (),
        "image_pooling": False,
    }
    assert Architecture(**values).steps == (16, 16)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="family fcn has"):
        Architecture(**(values | changes))  # type: ignore[arg-type]
