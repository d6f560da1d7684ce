"""What a network's output needs of its input: interval arithmetic over its real layers.

A region of the output is followed back through the stages: each layer says what it reads for it
(Araujo, Norris and Sim, "Computing receptive fields of convolutional neural networks", Distill
2019), in a scene without borders. Where branches meet, the needs of both are joined.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.domain import ContextWindow, Halo, Reach, Region
from pipeline.errors import BundleError
from pipeline.models.chain import Chain, Gate
from pipeline.models.context_pool import Context, WindowMean
from pipeline.models.deeplab import DeepLab
from pipeline.models.stages import stages_of


def receptive_field(chain: Chain) -> Region:
    """The pixels that coarse logit 0 depends on, image pooling left out."""
    return _needed(chain, {chain.logits: _first(chain)})[0]


def local_halo(chain: Chain) -> Halo:
    """Context, in pixels, of a region that is whole strides, image pooling left out."""
    return _halo(_needed(chain, _logits_of_a_stride(chain))[0], chain)


def reach_of(network: DeepLab, *, context: Context = "window") -> Reach:
    """The reach of a network, in pixels.

    Args:
        network: as ``Bundle.network`` gives it.
        context: ``window`` counts the image-pooling window. ``scene`` counts what the pooled
            features need, whose mean a pass of its own takes. ``tile`` leaves pooling out, and
            the network then is not exact.

    Raises:
        BundleError: a layer that mixes the whole scene or whose receptive field is not known, or
            image pooling without window.
    """
    chain = stages_of(network)
    if context != "tile":
        _check_local(chain)
    stride, endpoint = chain.stride, chain.endpoint
    image, pooled = _needed(chain, _logits_of_a_stride(chain))
    halo = _halo(image, chain).round_up(stride)
    if network.pool is None or context == "tile":
        return Reach(stride=stride, endpoint=endpoint, halo=halo)
    outer, steps = _trunk(chain)
    if context == "scene":
        if set(steps) != {stride}:
            raise BundleError(f"context scene needs features every {stride} px, they lie {steps}")
        outer = outer.round_up(stride)
        return Reach(stride=stride, endpoint=endpoint, halo=halo, pooled=outer)
    window = network.pool.mean.window
    if window is None or pooled is None:
        raise BundleError(
            "the image pooling of this network has no window, so that its reach is the scene:"
            " give it the training crop (pool_over), or ask for context 'tile'"
        )
    places = Region(
        tuple(a * s for a, s in zip(pooled.start, steps, strict=True)),
        tuple(b * s for b, s in zip(pooled.stop, steps, strict=True)),
    )
    size = tuple(side * s for side, s in zip(window, steps, strict=True))
    found = ContextWindow(size=size, steps=steps, inner=_halo(places, chain), outer=outer)
    return Reach(stride=stride, endpoint=endpoint, halo=halo, window=found)


def _check_local(chain: Chain) -> None:
    """Raise BundleError where a layer of the trunk mixes the whole scene."""
    layers = (step.layer for stage in chain.stages for step in stage.steps)
    gate = next((layer for layer in layers if isinstance(layer, Gate)), None)
    if gate is not None:
        raise BundleError(
            f"layer {gate.label} mixes the whole scene, so that no halo makes its tiles agree:"
            " ask for context 'tile', which is not exact"
        )


def _needed(chain: Chain, wanted: Mapping[str, Region]) -> tuple[Region, Region | None]:
    """What these regions of maps need of the image, and which places of image pooling, if any."""
    needed, pooled = dict(wanted), None
    for stage in reversed(chain.stages):
        region = needed.get(stage.name)
        if region is None:
            continue
        for step, name in stage.reads():
            if isinstance(step.layer, WindowMean):
                pooled = region if pooled is None else pooled | region
                continue
            part = step.geometry.reads(region) if step.geometry else region
            needed[name] = part | needed.get(name, part)
    return needed[chain.image], pooled


def _trunk(chain: Chain) -> tuple[Halo, tuple[int, ...]]:
    """Context of the features that are pooled, in pixels, and how many lie between two of them."""
    pools = (p for s in chain.stages for p in s.steps if isinstance(p.layer, WindowMean))
    step = next(pools)
    assert isinstance(step.layer, WindowMean)
    steps = step.layer.steps(_ndim(chain))
    image, _ = _needed(chain, {step.inputs[0]: _first(chain)})
    after = (max(0, b - s) for b, s in zip(image.stop, steps, strict=True))
    return Halo(tuple(max(0, -a) for a in image.start), tuple(after)), steps


def _logits_of_a_stride(chain: Chain) -> dict[str, Region]:
    """The coarse logits of one stride of pixels from the scene's first."""
    stride = Region.whole((chain.stride,) * _ndim(chain))
    return {chain.logits: chain.upsample.reads(stride)}


def _halo(needed: Region, chain: Chain) -> Halo:
    """What is needed around one stride of pixels."""
    after = tuple(max(0, b - chain.stride) for b in needed.stop)
    return Halo(tuple(max(0, -a) for a in needed.start), after)


def _first(chain: Chain) -> Region:
    return Region.whole((1,) * _ndim(chain))


def _ndim(chain: Chain) -> int:
    return len(chain.upsample.up)
