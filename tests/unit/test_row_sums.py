from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.domain import Region
from pipeline.inference.row_sums import with_row_sums
from pipeline.inference.staged import StagedNetwork
from pipeline.models.chain import Chain, Convolution, Stage, Step
from pipeline.models.frame import Frame
from pipeline.models.geometry import Scale, Slide


def step(name: str, read: str, size: tuple[int, int], *, rate: int, bias: bool = False) -> Step:
    """A convolution, 3 x 3 or, at rate 0, 1 x 1, from ``size[0]`` channels to ``size[1]``."""
    kernel = (3, 3) if rate else (1, 1)
    slide = Slide(kernel=kernel, stride=(1, 1), padding=(rate, rate), dilation=(max(rate, 1),) * 2)
    generator = torch.Generator().manual_seed(len(name) + rate)
    weight = torch.randn(size[1], size[0], *kernel, generator=generator, dtype=torch.float64)
    added = torch.ones(size[1], dtype=torch.float64) if bias else None
    layer = Convolution(slide=slide, weight=weight, bias=added, groups=1)
    return Step(name=name, inputs=(read,), layer=layer, channels=size[1])


def chain_of(*, bias: bool = False) -> Chain:
    """A wide map, a stage that is one atrous convolution of it, one that adds two more."""
    both = Step(name="both", inputs=("far", "near"), layer="add", channels=4, scratch=True)
    stages = (
        Stage((step("wide", "image", (2, 96), rate=0),)),
        Stage((step("only", "wide", (96, 4), rate=9, bias=bias),)),
        Stage(
            (
                step("far", "wide", (96, 4), rate=12),
                step("near", "wide", (96, 4), rate=0, bias=True),
                both,
            )
        ),
        Stage((step("logits", "only", (4, 3), rate=1),)),
    )
    last = Step(name="sum", inputs=("logits", "both"), layer="cat", channels=7)
    upsample = Scale(up=(1, 1), down=(1, 1), align_corners=False)
    return Chain(
        stages=(*stages, Stage((last,))), image="image", bands=2, upsample=upsample, stride=1
    )


def logits(chain: Chain, image_BCS: Tensor, coarse: Region, *, window: int) -> Tensor:
    shape = tuple(image_BCS.shape[2:])
    with torch.inference_mode():
        network = StagedNetwork(chain, window=window)
        return network.coarse_logits(image_BCS, Frame((0, 0), shape), coarse)


@pytest.mark.parametrize("window", [4, 9, 64])
@pytest.mark.parametrize(
    "coarse",
    [Region((0, 0), (70, 30)), Region((0, 3), (9, 30)), Region((31, 0), (40, 30))],
    ids=["all of it", "at the top", "within"],
)
def test_sums_by_rows_are_what_the_convolutions_give(coarse: Region, window: int) -> None:
    """A row of a kernel would be added at a wrong place, twice, or to what another map left."""
    chain = chain_of()
    summed = with_row_sums(chain)
    assert [stage.name for stage in summed.stages if stage.eager] == ["only", "far", "near"]
    image_BCS = torch.randn(1, 2, 70, 30, dtype=torch.float64)
    want_BKS = logits(chain, image_BCS, coarse, window=window)
    found_BKS = logits(summed, image_BCS, coarse, window=window)
    assert (found_BKS - want_BKS).abs().max() <= 1e-12 * want_BKS.abs().max()


def test_a_bias_would_be_added_for_each_row() -> None:
    """DeepLab v2's branches have one: their map is held as before."""
    chain = chain_of(bias=True)
    assert with_row_sums(chain).stages == chain.stages
