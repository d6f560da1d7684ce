"""Convolutions that are added up row by row of their kernel, while the map they read is made.

ASPP reads a map of 2048 channels over 72 rows and makes 256 channels of it, three times. Added up
as the rows of that map are made, the sums that wait for more of them take a third of its room.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType

import torch

from pipeline.models.chain import Chain, Convolution, Stage, Step

_FORMAT = MappingProxyType({2: torch.channels_last, 3: torch.channels_last_3d})

_FAR = 8
"""Rows that a kernel must reach to either side: below that a map holds little more than a band."""


def with_row_sums(chain: Chain) -> Chain:
    """The chain with such convolutions as stages of their own, wherever that halves the room."""
    readers: dict[str, list[Step]] = {}
    for stage in chain.stages:
        for step, name in stage.reads():
            readers.setdefault(name, []).append(step)
    wide = {name for name, steps in readers.items() if _pays(chain.channels[name], steps)}
    stages = tuple(part for stage in chain.stages for part in _apart(stage, wide))
    return replace(chain, stages=stages)


def lead(step: Step) -> int:
    """Rows after a row it reads, that the row which a step of an eager stage makes of it lies."""
    return step.layer.slide.padding[0] if isinstance(step.layer, Convolution) else 0


def _pays(channels: int, steps: list[Step]) -> bool:
    """Whether sums of all that reads a map of so many channels take half of its room, or less."""
    if not all(_summable(step) for step in steps):
        return False
    reaches = [lead(step) for step in steps]  # to either side
    most = max(reaches)
    if most < _FAR:
        return False
    sums = sum((reach + most) * step.channels for step, reach in zip(steps, reaches, strict=True))
    return sums <= most * channels


def _summable(step: Step) -> bool:
    layer = step.layer
    if not isinstance(layer, Convolution):
        return False
    slide = layer.slide
    rows = zip(slide.padding, slide.dilation, slide.kernel, strict=True)
    same = set(slide.stride) == {1} and all(2 * p == d * (k - 1) for p, d, k in rows)
    return same and (step.geometry is None or layer.bias is None)


def _apart(stage: Stage, wide: set[str]) -> Iterator[Stage]:
    """A stage without the convolutions that read such maps, these before it."""
    reads = list(stage.reads())
    taken = [step for step, name in reads if name in wide]
    if not taken:
        yield stage
    elif len(reads) == 1 and taken[0].geometry is None:
        yield replace(stage, eager=True)
    else:
        yield from (Stage(tuple(_rows(step)), eager=True) for step in taken)
        names = {step.name for step in taken}
        left = tuple(
            # What was scratch is a map now.
            replace(step, scratch=step.scratch and step.inputs[0] not in names)
            for step in stage.steps
            if step.name not in names
        )
        if left:  # else it was nothing but such a convolution
            yield Stage(left)


def _rows(step: Step) -> Iterator[Step]:
    """A convolution as the sum of one for each row of its kernel, from the first row read on."""
    layer = step.layer
    assert isinstance(layer, Convolution)
    slide, count = layer.slide, layer.slide.kernel[0]
    if count == 1:
        yield step
        return
    total = ""
    for row in range(count):
        one = replace(
            slide,
            kernel=(1, *slide.kernel[1:]),
            padding=(slide.padding[0] - row * slide.dilation[0], *slide.padding[1:]),
            dilation=(1, *slide.dilation[1:]),
        )
        name = f"{step.name}_row{row}"
        # A copy, or every window would make one: maps and weights keep channels innermost.
        weight = layer.weight.narrow(2, row, 1).contiguous(memory_format=_FORMAT[len(slide.kernel)])
        part = replace(layer, slide=one, weight=weight)
        yield replace(step, name=name, layer=part, scratch=False)
        if row:
            made = step.name if row == count - 1 else f"{step.name}_sum{row}"
            both = (total, name)
            yield Step(name=made, inputs=both, layer="add", channels=step.channels, scratch=True)
            total = made
        else:
            total = name
