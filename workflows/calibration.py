"""How long the network will take: a short run of it on this machine, on noise."""

from __future__ import annotations

import time

import numpy as np

from pipeline.domain import Region
from pipeline.inference.predictor import Predictor
from pipeline.inference.stage_plan import needs_of, stage_work
from pipeline.inference.whole_cost import Trial
from pipeline.models.bundle import Bundle
from pipeline.models.frame import Frame
from workflows.costs import Team
from workflows.segment_plan import SegmentPlan
from workflows.tracing import traced

FEATURES = {2: 64, 3: 24}
"""Side of what is run, in features, by number of axes: a window's worth."""


def network_seconds(plan: SegmentPlan, bundle: Bundle) -> float:
    """Seconds of the network alone, all tiles over all workers of the plan.

    Reading, the CRF and writing run beside it and are left out. Raises BundleError.
    """
    resolved, dims = plan.resolved, bundle.architecture.dims
    predictor = Predictor(
        bundle,
        device=resolved.device,
        precision=resolved.precision,
        context=resolved.context,
        threads=resolved.threads,
        window=resolved.window,
        hosted=resolved.hosted,
    )
    body = traced(bundle, resolved.context).body
    if isinstance(body, Trial):
        shape = body.size
    else:
        shape = (FEATURES[dims] * body.stride + body.endpoint,) * dims
    whole = Region.whole(shape)
    image_CS = np.random.default_rng(0).normal(size=(body.bands, *shape)).astype(np.float32)
    seconds = []
    for _ in range(3):  # the first pays for what is made once
        start = time.perf_counter()
        predictor.logits(image_CS, Frame.of(whole, shape=shape), scored=whole).cpu()
        seconds.append(time.perf_counter() - start)
    if isinstance(body, Trial):
        work = body.work_px * whole.size
    else:
        work = stage_work(body, needs_of(body, whole, scored=whole, shape=shape))
    team = Team(workers=plan.workers, threads=1, device=resolved.device, alone=True)
    return plan.costs.span(team) * min(seconds) / work
