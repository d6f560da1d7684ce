"""The stages of a network whose image pooling is over the whole scene: two chains made of one."""

from __future__ import annotations

from dataclasses import replace

from pipeline.models.chain import Chain, Stage, Step
from pipeline.models.context_pool import WindowMean
from pipeline.models.scene_mean import GivenMean, OwnMean


def pooled_chain(chain: Chain) -> Chain:
    """The stages up to the features whose mean image pooling takes, in place of the logits."""
    names = [stage.name for stage in chain.stages]
    _, mean = _pooling(chain)
    return replace(chain, stages=chain.stages[: names.index(mean.inputs[0]) + 1])


def pooled_by(chain: Chain, layer: GivenMean | OwnMean) -> Chain:
    """The chain with its image pooling done by ``layer``; a mean that is given costs no work."""
    pool, mean = _pooling(chain)
    if isinstance(layer, OwnMean):
        return replace(chain, stages=tuple(_with(stage, mean, layer) for stage in chain.stages))
    source = next(stage for stage in chain.stages if stage.name == mean.inputs[0])
    _, features = next(source.reads())
    # It reads the trunk's features in name only: they say where it is.
    given = _with(pool, replace(mean, inputs=(features,)), layer)
    stages = (given if stage is pool else stage for stage in chain.stages if stage is not source)
    return replace(chain, stages=tuple(stages))


def _pooling(chain: Chain) -> tuple[Stage, Step]:
    """The stage of image pooling, and the step that takes the mean."""
    found = [(s, p) for s in chain.stages for p in s.steps if isinstance(p.layer, WindowMean)]
    assert len(found) == 1, "a network has one image pooling, or is not pooled over the scene"
    return found[0]


def _with(stage: Stage, mean: Step, layer: GivenMean | OwnMean) -> Stage:
    """The stage, its step of this name replaced by ``mean`` with another layer."""
    steps = (replace(mean, layer=layer) if s.name == mean.name else s for s in stage.steps)
    return Stage(tuple(steps))
