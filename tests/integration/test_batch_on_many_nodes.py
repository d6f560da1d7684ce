"""A batch on a Ray cluster that loses a node: the same masks as without any cluster."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from raylets import Raylets
from scenes import texture, write_raster

from adapters.ledger_file import LedgerFile
from pipeline.ports import Record
from workflows.batching import batch
from workflows.config import SegmentOptions
from workflows.run_dir import file_digest

pytestmark = pytest.mark.chaos
CASES = 12


def records(run: Path) -> list[Record]:
    ledgers = sorted((run / "cases").glob("*/ledger"))
    return [record for ledger in ledgers for record in LedgerFile(ledger, owner="t").history()]


def test_the_masks_of_a_cluster_that_lost_a_node_are_those_of_one_process(
    tmp_path: Path, slim: Path
) -> None:
    """Whoever computes a tile, and where, must not show in the file."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(CASES):
        image = np.stack([texture((250, 260), seed=9 * number + band) for band in range(3)])
        write_raster(folder / f"s{number}.tif", image)
    line = [
        str(Path(sys.executable).with_name("terravox")), "batch", str(folder), "-o", str(out),
        "--model", str(slim), "--tile", "32", "--precision", "fp32", "--tracking-uri", "none",
        "--json",
    ]  # fmt: skip
    with Raylets(tmp_path) as cluster:
        process = subprocess.Popen(
            [*line, "--ray-address", cluster.address],
            env=cluster.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        run, deadline = tmp_path / "out.run", time.monotonic() + 120
        while len({record.worker for record in records(run)}) < 4:
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        cluster.remove(cluster.nodes[0])
        lost_at = len(records(run))
        answer, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    assert json.loads(answer)["counts"]["done"] == CASES
    assert "the worker died" in errors.decode()
    found = records(run)
    assert lost_at < len(found), "the node was lost when all was over"
    assert len(found) == len({record.key for record in found})
    asked = SegmentOptions(backend="serial", tracking_uri="none", precision="fp32", tile=32)
    batch([folder], tmp_path / "calm", models=[slim], options=asked)
    for number in range(CASES):
        name = f"s{number}.tif"
        assert file_digest(out / name) == file_digest(tmp_path / "calm" / name)
