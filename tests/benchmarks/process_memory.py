"""Peak memory of a command and of all that it starts: PSS, summed, sampled from outside."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_S = 0.2
SPARED = 30
"""A sample is followed by a rest of so many times what it took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a run took."""

    seconds: float
    peak_bytes: int
    """Most that all processes held at one moment (proportional set size, summed)."""


def measure(command: Sequence[str], *, env: dict[str, str]) -> Measured:
    """Run a command to its end. Raises CalledProcessError when it fails."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(command, env=env)
    while process.poll() is None:
        began = time.monotonic()
        peak = max(peak, _held(process.pid))
        # Counting the pages of gigabytes holds up whoever asks for more of them.
        time.sleep(max(SAMPLE_S, SPARED * (time.monotonic() - began)))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Measured(seconds=time.monotonic() - start, peak_bytes=peak)


def _held(pid: int) -> int:
    """The command, who plans for it, its actors, and Ray's daemons."""
    try:
        started = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return 0
    return sum(_pss(each) for each in (pid, *(process.pid for process in started)))


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
