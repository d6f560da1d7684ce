"""Where the maps of a tile lie in one block of memory: arithmetic, nothing runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.domain import Region
from pipeline.inference.stage_plan import Needs, beside, block_of, own_padding
from pipeline.inference.turns import Turns
from pipeline.models.chain import Chain, Convolution, Gate, Stage, Step
from pipeline.models.context_pool import WindowMean
from pipeline.models.geometry import Slide
from pipeline.models.scene_mean import OwnMean

_LINE = 16
"""A map starts at a multiple of so many numbers, as memory of its own would."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One block of memory for the image and all maps but the logits, which others hold."""

    starts: Mapping[str, int]
    """Number of the block at which a map starts."""

    size: int
    """Numbers of the block."""

    @classmethod
    def of(cls, chain: Chain, needs: Needs, turns: Turns) -> Layout:
        """The largest maps first, each at the lowest place that is free in its time."""
        sizes = {
            name: height * row_size(chain, needs, name)
            for name, height in turns.heights.items()
            if name != chain.logits
        }
        starts: dict[str, int] = {}
        for name in sorted(sizes, key=lambda name: (-sizes[name], turns.lives[name])):
            first, last = turns.lives[name]
            taken = []
            for other, start in starts.items():
                born, dies = turns.lives[other]
                if born <= last and first <= dies:
                    taken.append((start - sizes[name], start + sizes[other]))
            starts[name] = _lowest(taken)
        return cls(starts, max((starts[name] + sizes[name] for name in sizes), default=0))


def row_size(chain: Chain, needs: Needs, name: str) -> int:
    """Numbers of a row (or plane) of a map."""
    return math.prod(needs.regions[name].shape[1:]) * chain.channels[name]


def _lowest(taken: Iterable[tuple[int, int]]) -> int:
    """The lowest start that lies strictly between no such pair, on a line of memory."""
    start = 0
    for low, high in sorted(taken):
        if low < start < high:
            start = -(-high // _LINE) * _LINE
    return start


class StageBytes(NamedTuple):
    """Peak bytes of what a network in stages holds."""

    maps: int
    """Of the block of all maps; of the image a band is held."""

    windows: int
    """Of the scratch of one window, and of the logits: on the device, wherever maps are."""

    @classmethod
    def of(
        cls, chain: Chain, needs: Needs, *, window: int, itemsize: int, hosted: bool
    ) -> StageBytes:
        """Counted for one tile.

        Args:
            chain: the network's stages.
            needs: of the tile.
            window: side of a window, in features, where windows are runs of rows.
            itemsize: bytes of a number in the maps.
            hosted: whether a window's part of a map is copied to the device.
        """
        block = Layout.of(chain, needs, Turns.of(chain, needs, window=window)).size
        logits = needs.regions[chain.logits].size * chain.channels[chain.logits]
        scratch = max(
            _scratch(stage, needs, channels=chain.channels, window=window)
            + hosted * _fetched(stage, needs, channels=chain.channels, window=window)
            for stage in chain.stages
        )
        return cls(block * itemsize, (logits + scratch) * itemsize)


def _fetched(stage: Stage, needs: Needs, *, channels: Mapping[str, int], window: int) -> int:
    """Numbers of maps that one window reads, whole rows where little lies beside it."""
    block = Region.whole(block_of(stage, needs, window)).move(needs.computed(stage).start)
    return sum(
        _reads(step, block, name, needs) * channels[name] * 9 // 8 for step, name in stage.reads()
    )


def _reads(step: Step, block: Region, name: str, needs: Needs) -> int:
    """Places of a map that the step reads for ``block``."""
    if isinstance(step.layer, WindowMean):
        return _copied(step, block, name, needs)
    if isinstance(step.layer, (OwnMean, Gate)):
        return needs.regions[name].size
    return step.geometry.reads(block).size if step.geometry else block.size


def _scratch(stage: Stage, needs: Needs, *, channels: Mapping[str, int], window: int) -> int:
    """Numbers that one window takes beside the maps."""
    start, shape = needs.computed(stage).start, block_of(stage, needs, window)
    block = Region.whole(shape).move(start)
    made = sum(step.channels for step in stage.steps if not step.scratch) * block.size
    # While a step runs: a part of a map that is padded, or narrower than the map, is copied, and
    # all that a canonical window reads; weights are reordered.
    copies: dict[str, int] = {}
    for step, name in stage.reads():
        if step.spreads or isinstance(step.layer, Convolution) or needs.sides is not None:
            copied = _copied(step, block, name, needs) * channels[name]
            copies[step.name] = copies.get(step.name, 0) + copied
    weights = [s.layer.weight.numel() for s in stage.steps if isinstance(s.layer, Convolution)]
    return made + max(copies.values(), default=0) + max(weights, default=0)


def _copied(step: Step, block: Region, name: str, needs: Needs) -> int:
    """Places of a map that the step copies to read them for ``block``."""
    shape = needs.shapes[name]
    if isinstance(step.layer, WindowMean):
        spans = step.layer.window or shape
        return math.prod(
            min(side, span + n) for side, span, n in zip(shape, spans, block.shape, strict=True)
        )
    held, over = needs.regions[name], step.geometry
    if over is None:
        whole = needs.sides is None and block.shape[1:] == held.shape[1:]
        return 0 if whole else block.size
    reads = over.reads(block)
    if needs.sides is not None or not isinstance(over, Slide) or set(over.stride) != {1}:
        return reads.size
    inside = reads.clip(shape)
    lacks = [
        (b - a, c - d)
        for a, b, c, d in zip(reads.start, inside.start, reads.stop, inside.stop, strict=True)
    ]
    pairs = list(zip(lacks, block.shape, strict=True))[1:]  # rows are cut where padding begins
    padded = any(own_padding(ends, side, 1) < max(ends) for ends, side in pairs)
    rows = inside.grow(beside(inside, held))
    return reads.size if padded or rows.shape[1:] != held.shape[1:] else 0
