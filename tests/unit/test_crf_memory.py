"""What a CRF takes of memory, against what was said: in a process of its own, with its peak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.crf.engine import installed

BEFORE = """
import ctypes, json, sys
from dataclasses import replace
import numpy as np
from adapters.memory import MemorySource
from pipeline.crf.dense import Unrefined, refine, refine_each
from pipeline.crf.engine import engine_named
from pipeline.crf.memory import crf_memory
from pipeline.crf.native_engine import MOST_KEPT_BYTES
from pipeline.crf.params import CrfParams
from pipeline.crf.density import density_of
from pipeline.ports import Block

def status(key):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

side, rng = 512, np.random.default_rng(0)
noise = rng.integers(0, 256, (3, side, side), dtype=np.uint8)
place = np.indices((side, side)) / 40
hills = 128 + 70 * np.sin(place[0]) * np.cos(place[1] + np.arange(3)[:, None, None])
image = (hills + rng.normal(0, 3, hills.shape)).clip(0, 255).astype(np.uint8)
appearance = {"weight": 4, "position": 67, "value": 3, "bands": ["1", "2", "3"], "range": [0, 255]}
mapping = {"iterations": 1, "smoothness": {"weight": 3, "position": 3}, "appearance": appearance}
params = CrfParams.from_mapping(mapping).resolve((1, 1), unit="px", channels=("1", "2", "3"))
name, found = sys.argv[1], []
"""

ALONE = """
for guide, classes in ((image, 2), (image, 12), (noise, 12)):
    crf = replace(params, engine=name)
    density = density_of(MemorySource(guide), crf, tile=(side, side))
    said = crf_memory((side, side), crf, density, classes=classes)
    prob = np.full((classes, side, side), 1 / classes, np.float32)
    block = Block(guide, np.ones((side, side), np.bool_))
    engine = engine_named(name, device="cpu", threads=1)
    small = Block(guide[:, :16, :16], block.valid_S[:16, :16])
    refine(prob[:, :16, :16], block=small, origin=(0, 0), params=crf, engine=engine)
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    refine(prob, block=block, origin=(0, 0), params=crf, engine=engine)
    measured = status("VmHWM") - before
    kept = MOST_KEPT_BYTES  # of plans for other shapes, of which there are none here
    found.append([measured, said.host + said.engine, said.host + said.engine - kept])
    engine_named.cache_clear()
    del engine
print(json.dumps(found))
"""


TOGETHER = """
def crops(guide, side):
    for row in range(0, 512, side):
        for column in range(0, 512, side):
            window = slice(row, row + side), slice(column, column + side)
            block = Block(guide[:, *window], np.ones((side, side), np.bool_))
            prob = np.full((6, side, side), 1 / 6, np.float32)
            yield Unrefined(prob_KS=prob, block=block, origin=(0, 0), params=crf)

crf, engine = replace(params, engine=name), engine_named(name, device="cpu", threads=1)
for guide, side in ((image, 64), (noise, 64), (image, 16)):
    density = density_of(MemorySource(guide), crf, tile=(side, side))
    said = crf_memory((engine.most_together // side, side), crf, density, classes=6)
    next(refine_each([next(crops(guide, side))], engine=engine))
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    count = sum(1 for _ in refine_each(crops(guide, side), engine=engine))
    assert count == (512 // side) ** 2
    found.append([status("VmHWM") - before, said.host + said.engine])
print(json.dumps(found))
"""


def measured_by(script: str, name: str, *, cwd: Path) -> list[list[int]]:
    """In a process of its own."""
    call = [sys.executable, "-c", BEFORE + script, name]
    out = subprocess.run(call, check=True, capture_output=True, text=True, cwd=cwd).stdout
    found: list[list[int]] = json.loads(out)
    return found


@pytest.mark.parametrize("name", ["native", "torch", "pydensecrf"])
def test_an_engine_takes_no_more_than_was_said_and_not_much_less(name, tmp_path: Path) -> None:
    """A node sized by the plan would be killed; or, by the memory of noise, be paid twice."""
    if not installed(name):
        pytest.skip(f"the CRF engine {name} is not installed here")
    cases = measured_by(ALONE, name, cwd=tmp_path)
    assert [measured <= said for measured, said, _ in cases] == [True] * len(cases), cases
    assert max(close / measured for measured, _, close in cases[:2]) < 1.6, cases


def test_crops_that_share_calls_take_no_more_than_one_image_of_as_many_pixels(tmp_path: Path):
    """A list of a thousand crops would take the memory of all of them at once."""
    cases = measured_by(TOGETHER, "torch", cwd=tmp_path)
    assert [measured <= said for measured, said in cases] == [True] * len(cases), cases
