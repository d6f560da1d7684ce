"""``make stress``: kill drivers and actors at random; the file must not show it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from scenes import fresh, texture, write_raster

from adapters.ledger_file import LedgerFile
from workflows.run_dir import file_digest

SIDE, TILE, KILLS = 2048, 128, 12


def command(folder: Path, output: Path, *more: str) -> list[str]:
    """``terravox segment`` on the scene in ``folder``."""
    return [
        str(Path(sys.executable).with_name("terravox")), "segment", str(folder / "scene.tif"),
        "-o", str(output), "--model", str(folder / "slim"), "--tile", str(TILE), "--crf", "off",
        "--precision", "fp32", "--tracking-uri", "none", *more,
    ]  # fmt: skip


def kill_at_random(process: subprocess.Popen[bytes], chance: random.Random) -> str | None:
    """Wait a moment, then kill the driver or one of its actors; what was killed, if anything."""
    time.sleep(chance.uniform(4.0, 9.0))
    if process.poll() is not None:
        return None
    children = psutil.Process(process.pid).children(recursive=True)
    actors = [
        child for child in children if child.cmdline()[:1] and "TileActor" in child.cmdline()[0]
    ]
    if actors and chance.random() < 0.5:
        chance.choice(actors).kill()
        return "actor"
    process.send_signal(signal.SIGKILL)
    process.wait()
    return "driver"


def main() -> None:
    """Print every kill, then whether the file equals the one of an undisturbed run."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="terravox-stress-") as name:
        folder = Path(name)
        image = np.stack([texture((SIDE, SIDE), seed=n) for n in range(3)])
        write_raster(folder / "scene.tif", image)
        fresh(folder / "slim")
        env = os.environ | {"HOME": name}
        whole, killed = folder / "whole.tif", folder / "killed.tif"
        subprocess.run(command(folder, whole, "--backend", "serial"), env=env, check=True)
        kills = 0
        while not killed.exists():
            process = subprocess.Popen(command(folder, killed), env=env)
            while process.poll() is None and kills < KILLS:
                victim = kill_at_random(process, chance)
                if victim:
                    kills += 1
                    print(f"kill {kills}: {victim}", flush=True)
            if process.wait() not in (0, -signal.SIGKILL):
                sys.exit(f"seed {seed}: the command ended with {process.returncode}")
        history = list(LedgerFile(Path(f"{killed}.run/ledger"), owner="stress").history())
        twice = len(history) - len({record.key for record in history})
        same = file_digest(whole) == file_digest(killed)
        print(
            f"seed {seed}: {kills} kills, {len(history)} tiles noted, {twice} noted twice,"
            f" the file is {'the same' if same else 'ANOTHER'}"
        )
        sys.exit(not same)


if __name__ == "__main__":
    main()
