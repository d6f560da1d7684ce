"""``make bench-batch``: sixty files, six of them damaged; killed on the way, and against a loop."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml
from dicom_files import write_series
from scenes import fresh, texture, write_raster

from adapters.ledger_file import CaseLedgerFile, LedgerFile

SCENES, VOLUMES = 36, 18
SROW_X = 280
"""Byte of the first row of the sform in a NIfTI-1 header."""
SCRIPT = str(Path(sys.executable).with_name("terravox"))
OPTIONS = ["--tile", "256", "--workers", "2", "--tracking-uri", "none"]


def make_archive(folder: Path) -> list[Path]:
    """54 good files of mixed sizes, and six that go wrong in six ways; returns the good ones."""
    folder.mkdir()
    noise = [texture((1100, 1100), seed=band) for band in range(3)]
    good = []
    for number in range(SCENES):
        side = 300 + 20 * number
        image = np.stack([np.roll(band, 31 * number, axis=0)[:side, :700] for band in noise])
        good.append(write_raster(folder / f"scene{number:02d}.tif", image))
    scan = texture((110, 110, 110), seed=7).astype(np.int16)
    for number in range(VOLUMES):
        path = folder / f"scan{number:02d}.nii.gz"
        nib.save(nib.Nifti1Image(np.roll(scan, number, axis=0)[: 60 + 2 * number], np.eye(4)), path)
        good.append(path)
    (folder / "truncated.tif").write_bytes(good[0].read_bytes()[:100_000])
    write_raster(folder / "wrong_bands.tif", noise[0][np.newaxis, :200, :200])
    damaged = bytearray(nib.Nifti1Image(scan[:20], np.eye(4)).to_bytes())
    struct.pack_into("<4f", damaged, SROW_X, *[math.nan] * 4)
    (folder / "nan_affine.nii").write_bytes(damaged)
    (folder / "empty.nii.gz").touch()
    (folder / "unreadable.tif").symlink_to(folder / "gone.tif")

    def as_mr(_: int, dataset: Any) -> None:
        dataset.Modality = "MR"

    write_series(folder / "wrong_modality", scan[:12, :20, :16], change=as_mr)
    return good


class Night:
    """One batch, in as many processes as it takes."""

    def __init__(self, folder: Path, models: list[str], output: Path) -> None:
        self.run = Path(f"{output}.run")
        self.line = [SCRIPT, "batch", str(folder), "-o", str(output), *models, *OPTIONS, "--json"]

    def start(self) -> subprocess.Popen[bytes]:
        """A driver."""
        return subprocess.Popen(self.line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def finish(self) -> tuple[int, dict[str, Any], float]:
        """Exit code, answer and seconds of an undisturbed command."""
        begun = time.monotonic()
        process = self.start()
        out, _ = process.communicate()
        return process.returncode, json.loads(out.splitlines()[-1]), time.monotonic() - begun

    def done(self) -> list[str]:
        """Cases, as often as they were finished."""
        history = CaseLedgerFile(self.run / "ledger", owner="bench").history()
        return [record.case for record in history if record.state == "done"]

    def tiles(self) -> list[Any]:
        """Records of tiles, over all cases."""
        ledgers = sorted((self.run / "cases").glob("*/ledger"))
        return [r for one in ledgers for r in LedgerFile(one, owner="bench").history()]


def wait(condition: Callable[[], bool]) -> None:
    """Until it holds."""
    while not condition():
        time.sleep(0.05)


def disturbed(night: Night) -> None:
    """Driver and actors, each killed twice; then to the end."""
    for goal in (12, 30):
        dead = {record.worker for record in night.tiles()}
        process = night.start()
        wait(lambda goal=goal: len(night.done()) >= goal)
        alive = {record.worker for record in night.tiles()} - dead
        actor = int(alive.pop().split(":")[1])
        os.kill(actor, signal.SIGKILL)
        wait(lambda goal=goal: len(night.done()) >= goal + 6)
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"killed actor {actor} and driver {process.pid} with {len(night.done())} cases done")
    code, answer, _ = night.finish()
    tiles = [record.key for record in night.tiles() if record.status == "done"]
    twice = len(night.done()) - len(set(night.done()))
    print(f"exit {code}, {answer['counts']}")
    print(f"cases finished twice: {twice}; tiles noted twice: {len(tiles) - len(set(tiles))}")
    for row in answer["cases"]:
        if row["status"] != "done":
            print(f"  {row['id']:15} {row['status']:12} {row['reason'][:110]}")


def main() -> None:
    """Print what happened, and cases per minute."""
    with tempfile.TemporaryDirectory(prefix="terravox-bench-") as name:
        top = Path(name)
        os.environ["HOME"] = name
        good = make_archive(top / "in")
        flat = fresh(top / "flat").path
        deep = fresh(top / "deep", dims=3, bands=1).path
        document = yaml.safe_load((deep / "model.yaml").read_text())
        document["input"]["modality"] = "CT"
        (deep / "model.yaml").write_text(yaml.safe_dump(document))
        models = ["--model", str(flat), "--model", str(deep)]
        disturbed(Night(top / "in", models, top / "killed"))
        calm = Night(top / "in", models, top / "calm")
        _, answer, seconds = calm.finish()
        rate = 60 * answer["counts"]["done"] / seconds
        print(f"batch: {answer['counts']['done']} done in {seconds:.0f} s, {rate:.1f} cases/min")
        _, _, again = calm.finish()
        print(f"batch again, nothing new: {again:.1f} s")
        for backend in ("ray", "serial"):
            alone = each_alone(good, top / backend, {".tif": flat, ".gz": deep}, backend=backend)
            print(f"segment --backend {backend}, once per file: {alone:.1f} cases/min,"
                  f" batch x{rate / alone:.1f}")  # fmt: skip


def each_alone(files: list[Path], folder: Path, models: dict[str, Path], *, backend: str) -> float:
    """Cases per minute of one command after another."""
    folder.mkdir()
    begun = time.monotonic()
    for path in files:
        model = str(models[path.suffix])
        line = [SCRIPT, "segment", str(path), "-o", str(folder / path.name), "--model", model]
        subprocess.run([*line, *OPTIONS, "--backend", backend], check=True, capture_output=True)
    return 60 * len(files) / (time.monotonic() - begun)


if __name__ == "__main__":
    main()
