from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import fx, nn

from pipeline.domain import Region
from pipeline.errors import PlanError, RegionError, SourceError
from pipeline.inference import precision as precision_module
from pipeline.inference import predictor as predictor_module
from pipeline.inference.normalise import Normalised, normalise
from pipeline.inference.precision import Precision, processor_flags, resolve_precision
from pipeline.inference.predictor import Predictor
from pipeline.models.bundle import Architecture, Bundle, save_bundle
from pipeline.models.chain import Chain, Convolution
from pipeline.models.context_pool import Context
from pipeline.models.frame import Frame
from pipeline.models.fresh import new_bundle
from pipeline.models.input_spec import Scaling
from pipeline.models.receptive_field import reach_of
from pipeline.models.resize import Resize
from pipeline.models.scene_mean import GivenMean, OwnMean, block_sums, mean_of, total_of
from pipeline.ports import Block

FP32 = Precision(name="fp32", channels_last=True, why="")
BF16 = Precision(name="bf16", channels_last=True, why="")
FRAME = Frame((0, 0), (96, 128))
WHOLE = Region((0, 0), (96, 128))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    architecture = Architecture(
        family="v3", backbone="slim", dims=2, output_stride=8, rates=(1, 2), image_pooling=True
    )
    path = tmp_path_factory.mktemp("bundle") / "pooled"
    fresh = new_bundle(path, architecture=architecture, bands=2, classes=5, seed=4)
    return save_bundle(path, replace(fresh, crop=(40, 40)), fresh.network().state_dict())


def predictor_of(
    bundle: Bundle, precision: Precision = FP32, *, context: Context = "window"
) -> Predictor:
    return Predictor(bundle, device="cpu", precision=precision, context=context, threads=1)


def image_of(shape: tuple[int, ...] = (96, 128)) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)


@pytest.mark.parametrize("precision", [FP32, BF16])
def test_the_same_input_gives_the_same_bytes(bundle: Bundle, precision: Precision) -> None:
    """A retried tile would differ from the one that was lost."""
    first, second = predictor_of(bundle, precision), predictor_of(bundle, precision)
    logits_KS = first.logits(image_of(), FRAME, scored=WHOLE)
    for again in (first, second):
        assert torch.equal(again.logits(image_of(), FRAME, scored=WHOLE), logits_KS)
    assert (logits_KS.dtype, tuple(logits_KS.shape)) == (torch.float32, (5, 96, 128))


def test_the_predictor_gives_the_networks_own_logits(bundle: Bundle) -> None:
    """Memory format, or upsampling apart from the network, would change the values."""
    with torch.inference_mode():
        want_KS = bundle.network()(torch.from_numpy(image_of())[None], FRAME)[0]
    for channels_last in (True, False):
        precision = replace(FP32, channels_last=channels_last)
        got_KS = predictor_of(bundle, precision).logits(image_of(), FRAME, scored=WHOLE)
        assert (got_KS - want_KS).abs().max() <= 1e-4 * want_KS.std()


def test_what_is_made_of_weights_keeps_no_gradient_of_them(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel's rows would keep the whole kernel beside them: 54 MiB of a ResNet-50."""
    chains: list[Chain] = []
    monkeypatch.setattr(
        predictor_module, "with_row_sums", lambda chain: chains.append(chain) or chain
    )
    predictor_of(bundle)
    layers = [step.layer for stage in chains[0].stages for step in stage.steps]
    weights = [layer.weight for layer in layers if isinstance(layer, Convolution)]
    assert len(weights) > 5
    assert not any(weight.requires_grad for weight in weights)


def test_bf16_is_near_fp32_but_not_equal(bundle: Bundle) -> None:
    """The precision asked for would not be the one used, or its error be more than rounding."""
    full_KS = predictor_of(bundle).logits(image_of(), FRAME, scored=WHOLE)
    half_KS = predictor_of(bundle, BF16).logits(image_of(), FRAME, scored=WHOLE)
    error = (full_KS - half_KS).abs().max() / full_KS.std()
    assert 1e-4 < error < 0.2
    assert (full_KS.argmax(0) == half_KS.argmax(0)).float().mean() > 0.97


def test_context_is_the_one_asked_for(bundle: Bundle) -> None:
    """``tile`` would silently be ``window``, or the crop be ignored."""
    window_KS = predictor_of(bundle).logits(image_of(), FRAME, scored=WHOLE)
    tile_KS = predictor_of(bundle, context="tile").logits(image_of(), FRAME, scored=WHOLE)
    whole = replace(bundle, crop=(512, 512))
    assert not torch.allclose(window_KS, tile_KS, atol=1e-3)
    wide_KS = predictor_of(whole).logits(image_of(), FRAME, scored=WHOLE)
    assert torch.allclose(wide_KS, tile_KS, atol=1e-4)


@pytest.mark.parametrize(("precision", "worst"), [(FP32, 1e-4), (BF16, 0.2)])
def test_a_scene_of_one_tile_pools_over_itself_as_two_passes_would(
    bundle: Bundle, precision: Precision, worst: float
) -> None:
    """Sums in the floats of the features, or of other features, would give another mean."""
    predictor, ones = predictor_of(bundle, precision, context="scene"), np.ones((12, 16), bool)
    features_CS = predictor.pooled(image_of(), FRAME, core=WHOLE)
    assert (features_CS.dtype, tuple(features_CS.shape)) == (precision.dtype, (64, 12, 16))
    given = GivenMean(mean_of(total_of([block_sums(features_CS, ones, block=(8, 8))])))
    own = OwnMean(valid_S=ones, block=(8, 8))
    two_KS, one_KS = (
        predictor.logits(image_of(), FRAME, scored=WHOLE, pooling=pooling)
        for pooling in (given, own)
    )
    assert torch.equal(one_KS, two_KS)
    plain_KS = predictor_of(bundle, context="tile").logits(image_of(), FRAME, scored=WHOLE)
    assert (one_KS - plain_KS).abs().max() <= worst * plain_KS.std()


def test_with_canonical_windows_one_tile_and_many_pool_to_the_same_bits(bundle: Bundle) -> None:
    """A scene that fits one tile would differ in last bits from the same one in small tiles."""
    predictor = Predictor(
        bundle, device="cpu", precision=FP32, context="scene", threads=1, canonical_px=32
    )
    image_CS, shape = image_of(), (96, 128)
    valid_S = np.random.default_rng(1).random((12, 16)) < 0.8
    own = OwnMean(valid_S=valid_S, block=(4, 4))
    one_KS = predictor.logits(image_CS, FRAME, scored=WHOLE, pooling=own)
    reach = reach_of(bundle.network(), context="scene")
    assert reach.pooled is not None
    sums_CS = np.empty((65, 3, 4))
    for core in WHOLE.blocks((32, 64)):
        read = core.grow(reach.pooled).clip(shape)
        part_CS = image_CS[(slice(None), *read.slices(within=WHOLE))]
        features_CS = predictor.pooled(part_CS, Frame.of(read, shape=shape), core=core)
        places, blocks = (
            tuple(slice(a // side, b // side) for a, b in zip(core.start, core.stop, strict=True))
            for side in (8, 32)
        )
        part = block_sums(features_CS, valid_S[places], block=own.block)
        sums_CS[(slice(None), *blocks)] = part
    given = GivenMean(mean_of(total_of([sums_CS])))
    for core in WHOLE.blocks((32, 64)):
        read = reach.read(core, shape=shape)
        part_CS = image_CS[(slice(None), *read.slices(within=WHOLE))]
        frame = Frame.of(read, shape=shape)
        tile_KS = predictor.logits(part_CS, frame, scored=core, pooling=given)
        assert torch.equal(tile_KS, one_KS[(slice(None), *core.slices(within=WHOLE))])


def test_an_input_off_the_stride_or_the_scene_is_refused(bundle: Bundle) -> None:
    """Tiles would be sampled on another grid than the scene, which no halo mends."""
    predictor = predictor_of(bundle)
    with pytest.raises(RegionError, match="multiple of the output stride 8 px"):
        predictor.logits(image_of((96, 124)), FRAME, scored=WHOLE)
    with pytest.raises(RegionError, match="multiple of the output stride 8 px"):
        predictor.logits(image_of((96, 64)), Frame((0, 4), (96, 128)), scored=WHOLE)
    with pytest.raises(RegionError, match="outside the padded scene"):
        predictor.logits(image_of((96, 128)), Frame((0, 8), (96, 128)), scored=WHOLE)
    with pytest.raises(SourceError, match="takes 2 bands, the input has 1"):
        predictor.logits(image_of()[:1], FRAME, scored=WHOLE)


def test_auto_takes_bf16_only_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An emulated bf16 would be slower than fp32, and less exact, by default."""
    monkeypatch.setattr(precision_module, "processor_flags", lambda: frozenset({"avx2"}))
    plain = resolve_precision("auto", device="cpu")
    assert (plain.name, plain.channels_last) == ("fp32", True)
    assert "no native bfloat16" in plain.why
    with pytest.raises(PlanError, match="no native bfloat16"):
        resolve_precision("bf16", device="cpu")
    monkeypatch.setattr(precision_module, "processor_flags", lambda: frozenset({"amx_bf16"}))
    native = resolve_precision("auto", device="cpu")
    assert (native.name, native.dtype) == ("bf16", torch.bfloat16)
    assert "amx_bf16" in native.why
    assert resolve_precision("fp32", device="cpu").dtype is torch.float32


def test_processor_flags_are_read_from_the_first_processor(tmp_path: Path) -> None:
    """A flag of the bug list, or of no processor, would be taken for an instruction set."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags\t\t: fpu avx512_bf16\nbugs : amx_bf16\nflags : x\n")
    assert processor_flags(cpuinfo) == {"fpu", "avx512_bf16"}
    assert processor_flags(tmp_path / "absent") == frozenset()


def test_a_device_that_is_not_there_is_refused() -> None:
    """A run asked for a GPU would go to the CPU without a word."""
    with pytest.raises(PlanError, match="there are: cpu, cuda"):
        resolve_precision("auto", device="mps")
    if not torch.cuda.is_available():
        with pytest.raises(PlanError, match="no CUDA device"):
            resolve_precision("fp32", device="cuda")


@pytest.mark.parametrize("canonical_px", [None, 64])
def test_the_input_is_freed_before_logits_are_upsampled(
    bundle: Bundle, canonical_px: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image of floats is larger than the maps of a slim network: it would be held beside the
    logits, which are larger still."""
    predictor = Predictor(
        bundle,
        device="cpu",
        precision=FP32,
        context="window",
        threads=1,
        canonical_px=canonical_px,
    )
    kept: list[weakref.ref[NDArray[np.float32]]] = []

    def made() -> NDArray[np.float32]:
        image_CS = image_of()
        kept.append(weakref.ref(image_CS))
        return image_CS

    def upsampled(layer: Resize, logits_BKS: torch.Tensor) -> torch.Tensor:
        assert kept[0]() is None
        return upsample(layer, logits_BKS)

    upsample = Resize.forward
    monkeypatch.setattr(Resize, "forward", upsampled)
    predictor.logits(made(), FRAME, scored=WHOLE)


@pytest.mark.parametrize("canonical_px", [None, 32])
def test_an_image_normalised_in_bands_gives_the_bits_of_one_normalised_at_once(
    bundle: Bundle, canonical_px: int | None
) -> None:
    """Bands would be cut from the wrong rows, or the next one come before one is read."""
    predictor = Predictor(
        bundle,
        device="cpu",
        precision=FP32,
        context="window",
        threads=1,
        window=8,
        canonical_px=canonical_px,
    )
    generator = np.random.default_rng(2)
    image_CS = generator.integers(0, 999, (2, 96, 128)).astype(np.uint16)
    block = Block(image_CS, generator.random((96, 128)) < 0.9)
    scaling = Scaling(type="z-score", mean=(400.0, 500.0), std=(90.0,))
    asked: list[tuple[int, ...]] = []

    class Watched(Normalised):
        def __getitem__(self, index: tuple[slice, ...], /) -> NDArray[np.float32]:
            part_CS = super().__getitem__(index)
            asked.append(part_CS.shape)
            return part_CS

    bands_KS = predictor.logits(Watched(block, scaling), FRAME, scored=WHOLE)
    assert max(rows for _, rows, _ in asked) <= 64
    assert sum(rows for _, rows, _ in asked) == 96
    assert torch.equal(bands_KS, predictor.logits(normalise(block, scaling), FRAME, scored=WHOLE))


@pytest.mark.parametrize("canonical_px", [None, 64])
def test_another_network_may_be_traced_meanwhile(bundle: Bundle, canonical_px: int | None) -> None:
    """Tracing patches the modules of all threads: a batch plans one case while tiles of another
    run, and would lose them."""
    predictor = Predictor(
        bundle,
        device="cpu",
        precision=FP32,
        context="window",
        threads=1,
        canonical_px=canonical_px,
    )
    want_KS, found = predictor.logits(image_of(), FRAME, scored=WHOLE), []

    class Planned(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            with ThreadPoolExecutor(1) as device:
                call = device.submit(predictor.logits, image_of(), FRAME, scored=WHOLE)
                found.append(call.result())
            return image

    fx.Tracer().trace(Planned())
    assert torch.equal(found[0], want_KS)
