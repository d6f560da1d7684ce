"""The torch engine on another device than the processor, which is played: see ``elsewhere``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from elsewhere import played

from pipeline.crf.engine import Pairwise, Problem
from pipeline.crf.torch_engine import TorchEngine

RNG = np.random.default_rng(2)
NEAR_DN = RNG.random((2, 500), np.float32) * 8
LIKE_DN = RNG.random((5, 500), np.float32) * 4
PENALTY_KK = np.float32([[0, 1, 3, 3], [1, 0, 3, 2], [3, 3, 0, 3], [3, 2, 3, 0]])


def mean_field(device: Any, *, weight: float | np.ndarray, scale: float) -> np.ndarray:
    """Of one image and two, by one engine: the second time it has kept what recurs."""
    odds_KN = np.random.default_rng(0).dirichlet(np.ones(4), 500).T
    energy_KN = np.ascontiguousarray(-scale * np.log(odds_KN), np.float32)
    kernels = [
        Pairwise(features_DN=NEAR_DN, compatibility=3.0, recurring=True),
        Pairwise(features_DN=LIKE_DN, compatibility=weight),
    ]
    engine = TorchEngine(device=device, threads=1)
    problem = Problem(energy_KN=energy_KN, kernels=kernels)
    both = engine.mean_fields([problem, problem], iterations=1)
    engine.mean_field(energy_KN, kernels, iterations=1)
    return np.stack([*both, engine.mean_field(energy_KN, kernels, iterations=3)])


@pytest.mark.parametrize("weight", [4.0, PENALTY_KK], ids=["potts", "matrix"])
@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["small", "beyond exp"])
def test_all_stays_on_the_engines_device_until_it_is_the_answer(weight, scale):
    """On CUDA the first tile would fail: a constant left on the processor, or an index of it."""
    wanted = mean_field("cpu", weight=weight, scale=scale)
    with played() as device:
        found = mean_field(device, weight=weight, scale=scale)
    assert type(found) is np.ndarray
    assert found.tobytes() == wanted.tobytes()


def test_what_mixes_devices_or_is_not_copied_back_is_seen():
    """The test above would hold for an engine that fails on CUDA."""
    with played() as device:
        there = torch.ones(3).to(device)
        with pytest.raises(AssertionError, match="mixes devices"):
            there + torch.ones(3)
        with pytest.raises(AssertionError, match="mixes devices"):
            there.index_select(0, torch.arange(2))
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        assert (there + 1).cpu().tolist() == [2, 2, 2]
