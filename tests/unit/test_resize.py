from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pipeline.models.resize import Resize

FRACTIONS = [(3, 4), (4, 3), (1, 2), (2, 1), (5, 4), (8, 1)]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("up", "down"), FRACTIONS)
@pytest.mark.parametrize("dims", [2, 3])
def test_it_interpolates_as_torch_does(
    up: int, down: int, *, align_corners: bool, dims: int
) -> None:
    """Weights trained through torch's interpolation would meet other features."""
    sides = [k * down * 2 + align_corners for k in (3, 4, 2)][:dims]
    features_BCS = torch.randn(2, 3, *sides, dtype=torch.float64)
    layer = Resize((up,) * dims, (down,) * dims, align_corners=align_corners)
    wanted_BCS = F.interpolate(
        features_BCS,
        size=layer.size(tuple(sides)),
        mode="bilinear" if dims == 2 else "trilinear",
        align_corners=align_corners,
    )
    assert torch.allclose(layer(features_BCS), wanted_BCS, rtol=0, atol=1e-12)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("up", "down"), FRACTIONS)
def test_a_place_far_from_the_start_is_as_exact_as_one_near_it(
    up: int, down: int, *, align_corners: bool
) -> None:
    """Tiles of a large scene would not agree with one pass: places would drift along it."""
    layer = Resize((up, up), (down, down), align_corners=align_corners)
    row_S = torch.randn(60 * 512 + align_corners)
    scene_BCS = row_S.expand(1, 1, down * 4 + align_corners, -1).contiguous()
    tile_BCS = scene_BCS[..., -(8 * 60 + align_corners) :]
    scene_BCS, tile_BCS = layer(scene_BCS), layer(tile_BCS)
    inner = tile_BCS.shape[-1] - 2 * up
    assert torch.allclose(tile_BCS[..., -inner:], scene_BCS[..., -inner:], rtol=0, atol=1e-6)
