"""Layers beyond those of v3, in small networks: decoders, aligned corners, steps per axis."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from pipeline.domain import Grid, Halo, Pass, Region
from pipeline.errors import BundleError
from pipeline.inference.canonical import BoxMap, CanonicalNetwork, upsampled
from pipeline.inference.stage_plan import coarse_place, coarse_region
from pipeline.inference.staged import StagedNetwork
from pipeline.models.chain import Chain
from pipeline.models.context_pool import ContextPool, window_features
from pipeline.models.deeplab import DeepLab
from pipeline.models.frame import Frame
from pipeline.models.nan_probe import probe_network
from pipeline.models.receptive_field import local_halo, reach_of
from pipeline.models.resize import Resize
from pipeline.models.stages import stages_of

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_MAX = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_AVERAGE = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Small(nn.Module):
    """What every network here has, around ``coarse_logits``."""

    def __init__(self, *, dims: int, stride: int, last: Resize) -> None:
        super().__init__()
        self.architecture = SimpleNamespace(dims=dims)
        self.bands, self.classes, self.stride, self.upsample = 2, 3, stride, last
        self.pool: ContextPool | None = None

    def forward(self, image_BCS: Tensor, frame: Frame) -> Tensor:
        return cast(Tensor, self.upsample(self.coarse_logits(image_BCS, frame)))

    def conv(self, inputs: int, outputs: int, kernel: int, stride: Any = 1, rate: int = 1) -> Any:
        padding = kernel // 2 * rate
        dims = self.architecture.dims
        return _CONV[dims](inputs, outputs, kernel, stride, padding, rate)


class Decoder(Small):
    """As v3+: features of stride 8 meet those of stride 2, after pooling over a window."""

    def __init__(self, *, dims: int, corners: bool) -> None:
        super().__init__(dims=dims, stride=8, last=Resize.by(2, dims, align_corners=corners))
        self.stem = nn.Sequential(self.conv(2, 4, 3, stride=2), nn.ReLU())
        self.down = nn.Sequential(
            _MAX[dims](3, 2, 1, ceil_mode=corners), self.conv(4, 6, 3, stride=2), nn.ReLU()
        )
        self.wide = self.conv(6, 4, 3, rate=2)
        self.pool = ContextPool(self.conv(6, 4, 1), _NORM[dims](4), stride=8)
        self.up = Resize.by(4, dims, align_corners=corners)
        self.out = nn.Sequential(self.conv(12, 4, 3), nn.ReLU(), self.conv(4, 3, 1))

    def coarse_logits(self, image_BCS: Tensor, frame: Frame) -> Tensor:
        low_BCS = self.stem(image_BCS)
        deep_BCS = self.down(low_BCS)
        assert self.pool is not None
        wide_BCS = torch.cat([self.wide(deep_BCS), self.pool(deep_BCS, frame)], dim=1)
        return cast(Tensor, self.out(torch.cat([self.up(wide_BCS), low_BCS], dim=1)))


class Scales(Small):
    """As v2: one network at two scales of the input, average pool included, and the maximum."""

    def __init__(self, *, dims: int) -> None:
        super().__init__(dims=dims, stride=16, last=Resize.by(4, dims, align_corners=True))
        self.trunk = nn.Sequential(
            self.conv(2, 4, 3, stride=2),
            nn.ReLU(),
            _MAX[dims](3, 2, 1, ceil_mode=True),
            _AVERAGE[dims](3, 1, 1),
        )
        self.near, self.far = self.conv(4, 3, 3), self.conv(4, 3, 3, rate=3)
        self.shrink = Resize((3,) * dims, (4,) * dims, align_corners=True)
        self.grow = Resize((4,) * dims, (3,) * dims, align_corners=True)

    def scores(self, image_BCS: Tensor) -> Tensor:
        features_BCS = self.trunk(image_BCS)
        return torch.add(self.near(features_BCS), self.far(features_BCS))

    def coarse_logits(self, image_BCS: Tensor, frame: Frame) -> Tensor:
        small_BKS = self.grow(self.scores(self.shrink(image_BCS)))
        return torch.maximum(self.scores(image_BCS), small_BKS)


class Thick(Small):
    """Slices that are thick: along z the steps are 1 and 2, along y and x 4."""

    def __init__(self) -> None:
        last = Resize((2, 4, 4), (1, 1, 1), align_corners=False)
        super().__init__(dims=3, stride=4, last=last)
        self.stem = nn.Sequential(self.conv(2, 4, 3, stride=(1, 2, 2)), nn.ReLU())
        self.down = nn.Sequential(self.conv(4, 4, 3, stride=2), nn.ReLU())
        self.pool = ContextPool(self.conv(4, 3, 1), nn.BatchNorm3d(3), stride=(2, 4, 4))
        self.out = self.conv(7, 3, 3, rate=2)

    def coarse_logits(self, image_BCS: Tensor, frame: Frame) -> Tensor:
        deep_BCS = self.down(self.stem(image_BCS))
        assert self.pool is not None
        return cast(Tensor, self.out(torch.cat([deep_BCS, self.pool(deep_BCS, frame)], dim=1)))


NETWORKS = {
    "decoder": lambda: Decoder(dims=2, corners=False),
    "decoder, corners": lambda: Decoder(dims=2, corners=True),
    "decoder, 3-D": lambda: Decoder(dims=3, corners=False),
    "scales": lambda: Scales(dims=2),
    "scales, 3-D": lambda: Scales(dims=3),
    "thick": Thick,
}
CROP = {"decoder": (72, 56), "decoder, corners": (73, 57), "decoder, 3-D": (24, 24, 24)}
SHAPE = {2: (203, 331), 3: (43, 50, 75)}


def network_of(name: str, dtype: torch.dtype = torch.float64) -> DeepLab:
    torch.manual_seed(5)
    network = NETWORKS[name]().eval().to(dtype)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.3)
    if network.pool is not None:
        step = network.pool.mean.stride
        crop = CROP.get(name, (12, 24, 24))
        steps = (step,) * len(crop) if isinstance(step, int) else step
        window = window_features(crop, steps=steps)
        network.pool.mean.window = tuple(window)
    return cast(DeepLab, network)


def sweep_of(network: DeepLab, side: int, crf: int = 0) -> Pass:
    dims, reach = network.architecture.dims, reach_of(network)
    grid = Grid(
        shape=SHAPE[dims], tile=(side,) * dims, stride=reach.stride, endpoint=reach.endpoint
    )
    return Pass(case="", name="", grid=grid, reach=reach, crf_halo=Halo.uniform(crf, ndim=dims))


def scene_of(sweep: Pass, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Frame]:
    shape = sweep.grid.padded_shape
    generator = torch.Generator().manual_seed(1)
    scene_BCS = torch.randn(1, 2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return scene_BCS, Frame((0,) * len(shape), shape)


def cut(scene_BCS: Tensor, region: Region) -> Tensor:
    whole = Region.whole(tuple(scene_BCS.shape[2:]))
    return scene_BCS[(..., *region.slices(within=whole))]


def tile_logits(chain: Chain, scene_BCS: Tensor, frame: Frame, sweep: Pass, number: int) -> Tensor:
    """What a tile gives at the image's size, everything outside what it reads being left out."""
    tile, upsample = sweep.tile(number), chain.upsample
    coarse = coarse_region(tile.read, scored=tile.scored, upsample=upsample)
    staged = StagedNetwork(chain, window=9)
    here = Frame.of(tile.read, shape=frame.shape)
    here.check(tile.read.shape, stride=chain.stride, endpoint=chain.endpoint)
    coarse_BKS = staged.coarse_logits(cut(scene_BCS, tile.read), here, coarse)
    at = coarse.move(coarse_place(tile.read.start, upsample=upsample))
    fine_BKS = upsample.layer(coarse_BKS.contiguous())
    return fine_BKS[(..., *tile.scored.slices(within=upsample.gives(at)))]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("crf", [0, 5], ids=["", "with a margin"])
def test_tiles_agree_with_one_pass_over_the_scene(name: str, crf: int) -> None:
    """A layer's place, or what it reads beyond it, would be wrong where tiles meet or end."""
    network = network_of(name)
    sweep = sweep_of(network, 32 if network.architecture.dims == 2 else 16, crf)
    scene_BCS, frame = scene_of(sweep)
    some = [n for n, tile in enumerate(sweep.tiles()) if tile.read.shape != frame.shape]
    assert len(some) >= 8, "most tiles read the whole scene: nothing was compared"
    chain = stages_of(network)
    with torch.inference_mode():
        whole_BKS = network(scene_BCS, frame)
        assert whole_BKS.shape[2:] == scene_BCS.shape[2:]
        for number in some[:: len(some) // 8]:
            found_BKS = tile_logits(chain, scene_BCS, frame, sweep, number)
            wanted_BKS = cut(whole_BKS, sweep.tile(number).scored)
            assert (found_BKS - wanted_BKS).abs().max() <= 1e-12 * whole_BKS.std()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_halo_one_stride_shorter_is_too_short(name: str) -> None:
    """The tiles above would agree with a halo of any length, or the halo be longer than needed."""
    network = network_of(name)
    network.pool = None if network.pool is None else network.pool
    interval = local_halo(stages_of(network))
    if network.pool is not None:  # its window would reach further than the layers
        network.pool.mean.window = (1,) * network.architecture.dims
    found = probe_network(network, most_px=6 * interval.largest + 8 * network.stride).halo
    assert found is not None
    assert found | interval == interval
    for seen, said in zip(
        found.before + found.after, interval.before + interval.after, strict=True
    ):
        assert seen > said - network.stride


@pytest.mark.parametrize("name", ["decoder", "decoder, corners", "scales", "thick"])
def test_canonical_windows_give_a_place_the_same_bits_in_every_tile(name: str) -> None:
    """Windows that are not the scene's own would round otherwise from tile to tile."""
    network = network_of(name, torch.float32)
    dims = network.architecture.dims
    side_px = 32 if dims == 2 else 16
    chain = stages_of(network)
    canonical = CanonicalNetwork(chain, side_px=side_px)
    found = []
    with torch.inference_mode():
        for side, every in ((side_px, 7), (4 * side_px, 1)):
            sweep = sweep_of(network, side)
            scene_BCS, frame = scene_of(sweep, torch.float32)
            whole = Region.whole(frame.shape)
            scene_KS = torch.full((3, *frame.shape), torch.nan)
            for tile in list(sweep.tiles())[::every]:
                coarse = coarse_region(whole, scored=tile.scored, upsample=chain.upsample)
                part_BKS = canonical.coarse_logits(scene_BCS, frame, coarse)
                scene_KS[(..., *tile.scored.slices(within=whole))] = upsampled(
                    network.upsample.forward,
                    BoxMap(part_BKS.movedim(1, -1), coarse, part_BKS.device),
                    tile.scored,
                    side_px=side_px,
                    shape=frame.shape,
                    upsample=chain.upsample,
                )
            found.append(scene_KS[(..., *(slice(n) for n in sweep.grid.shape))])
    few, all_of_it = found
    seen = ~few.isnan()
    assert seen.float().mean() > 0.1
    assert torch.equal(few[seen], all_of_it[seen])


def test_pools_whose_size_depends_on_rounding_are_refused() -> None:
    """A map would have one row more in the whole network than in a tile."""
    network = Decoder(dims=2, corners=True)
    stages_of(cast(DeepLab, network.eval()))
    network.upsample = Resize.by(2, 2, align_corners=False)
    network.up = Resize.by(4, 2, align_corners=False)
    with pytest.raises(BundleError, match=r"down\.0 \(MaxPool2d\) is not known"):
        stages_of(cast(DeepLab, network))
