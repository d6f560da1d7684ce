"""Where the maps of a tile lie in one block of memory: arithmetic, nothing runs.

A map that a stage reads for the last time shares memory with the map that the stage makes: rows of
the one are written where rows of the other have been read. It need only start far enough behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.domain import Region, Shape
from pipeline.inference.stage_plan import Needs, needed_of, row_block
from pipeline.models.chain import Chain, Convolution, Stage, Step
from pipeline.models.context_pool import WindowMean

_BANDS = 16
"""Bands of rows in which a map is followed as it is made: one is lost between map and heir."""

_LINE = 16
"""A map starts at a multiple of so many numbers, as memory of its own would."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One block of memory for all maps but the image and the logits, which others hold."""

    starts: Mapping[str, int]
    """Number of the block at which a map starts; none for a map that overwrites another."""

    size: int
    """Numbers of the block."""

    @classmethod
    def of(cls, chain: Chain, needs: Needs) -> Layout:
        """The widest maps first, each at the lowest place that is free in its time."""
        roots = _roots(chain)
        made = {stage.name: at for at, stage in enumerate(chain.stages)}
        ends: dict[str, int] = {}
        leads: dict[tuple[str, str], int] = {}
        for at, stage in enumerate(chain.stages):
            for name in set(stage.frees) - {chain.image}:
                ends[roots[name]] = at
                if stage.overwrites is None:
                    lead = _lead(stage, name, roots[name], needs, chain.channels)
                    leads[roots[name], stage.name] = lead
        own = {name for name, root in roots.items() if name == root} - {roots[chain.logits]}
        sizes = {name: needs.regions[name].size * chain.channels[name] for name in own}
        starts: dict[str, int] = {}
        for name in sorted(own, key=lambda name: (-sizes[name], made[name])):
            taken = []
            for other, start in starts.items():
                if made[other] <= ends[name] and made[name] <= ends[other]:
                    before = leads.get((other, name), sizes[name])
                    after = leads.get((name, other), sizes[other])
                    taken.append((start - before, start + after))
            starts[name] = _lowest(taken)
        return cls(starts, max((starts[name] + sizes[name] for name in own), default=0))


def _roots(chain: Chain) -> dict[str, str]:
    """For each map the one whose memory it has: its own, or that of the map it overwrites."""
    roots: dict[str, str] = {}
    for stage in chain.stages:
        roots[stage.name] = roots[stage.overwrites] if stage.overwrites else stage.name
    return roots


def _lowest(taken: Iterable[tuple[int, int]]) -> int:
    """The lowest start that lies strictly between no such pair, on a line of memory."""
    start = 0
    for low, high in sorted(taken):
        if low < start < high:
            start = -(-high // _LINE) * _LINE
    return start


def _lead(stage: Stage, name: str, root: str, needs: Needs, channels: Mapping[str, int]) -> int:
    """How many numbers the map must start behind the stage's output, which is its heir.

    So that each band of rows of the output ends before what it, and those after it, still read.
    """
    made, held = needs.regions[stage.name], needs.regions[name]
    # Canonical windows leave a map that overwrites another at its places; rows pack it.
    pitched = held if needs.sides is None else needs.regions[root]
    row_made = math.prod(made.shape[1:]) * stage.channels
    row_held = math.prod(pitched.shape[1:]) * channels[name]
    readers = [step for step, read in stage.reads() if read == name]
    lead = -pitched.size * channels[name]
    for band in _bands(stage, needs):
        written = (min(band.stop[0], made.stop[0]) - made.start[0]) * row_made
        first = min(
            needed_of(step, band, needs.shapes[name], needs.frame).start[0] for step in readers
        )
        kept = max(first, held.start[0]) - pitched.start[0]
        lead = max(lead, written - kept * row_held)
    return lead


def _bands(stage: Stage, needs: Needs) -> Iterable[Region]:
    """The stage's output in bands of whole rows, no canonical window in two of them."""
    region = needs.computed(stage.name)
    height = -(-region.shape[0] // _BANDS)
    if needs.sides is not None:
        height = needs.sides[stage.name][0]
    return region.blocks((height, *region.shape[1:]))


def stage_bytes(chain: Chain, needs: Needs, *, window: int, itemsize: int) -> int:
    """Peak bytes of image and maps, with the scratch of one window.

    Args:
        chain: the network's stages.
        needs: of the tile.
        window: side of a window, in features, where windows are runs of rows.
        itemsize: bytes of a number in the maps.
    """
    layout = Layout.of(chain, needs)
    kept = chain.stages[-1].overwrites or chain.logits
    fixed = layout.size + needs.regions[kept].size * chain.channels[kept]
    image = needs.regions[chain.image].size * chain.bands
    peak = 0
    for stage in chain.stages:
        scratch = _scratch(stage, needs, channels=chain.channels, window=window)
        peak = max(peak, fixed + image + scratch)
        if chain.image in stage.frees:
            image = 0
    return peak * itemsize


def _scratch(stage: Stage, needs: Needs, *, channels: Mapping[str, int], window: int) -> int:
    """Numbers that one window takes beside the maps."""
    block = Region.whole(_block(stage, needs, window=window))
    made = sum(step.channels for step in stage.steps if not step.scratch) * block.size
    # A part of a map that is padded, or narrower than the map, is copied, and all that a canonical
    # window reads; weights are reordered.
    copies = [
        _copied(step, block, needs.shapes[name]) * channels[name]
        for step, name in stage.reads()
        if step.geometry is not None or needs.sides is not None
    ]
    weights = [s.layer.weight.numel() for s in stage.steps if isinstance(s.layer, Convolution)]
    return made + sum(copies) + max(weights, default=0)


def _block(stage: Stage, needs: Needs, *, window: int) -> Shape:
    """The largest box of a stage that is computed at once."""
    region = needs.computed(stage.name)
    if needs.sides is not None:
        pairs = zip(needs.sides[stage.name], region.shape, strict=True)
        return tuple(min(side, length) for side, length in pairs)
    return row_block(region.shape, region.size if stage.whole else window**region.ndim)


def _copied(step: Step, block: Region, shape: Shape) -> int:
    """Places of a map of ``shape`` that the step reads for ``block``."""
    if isinstance(step.layer, WindowMean):
        spans = step.layer.window or shape
        return math.prod(
            min(side, span + n) for side, span, n in zip(shape, spans, block.shape, strict=True)
        )
    return step.geometry.reads(block).size if step.geometry else block.size
