"""Files that every process of a run shares: made once, by whoever comes first, then read by all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from pipeline.errors import SourceError, SourceReadError


def content_name(paths: Iterable[Path], *, suffix: str) -> str:
    """A name that changes when one of ``paths`` does, by size or time. Raises OSError."""
    marks = []
    for path in paths:
        stat = path.stat()
        marks.append(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()[:16] + suffix


def make_once(path: Path, *, write: Callable[[IO[bytes]], None]) -> Path:
    """``path``, written by ``write`` unless it is there; a partial file never has its name.

    Raises:
        OSError: the folder cannot be written to; what ``write`` raises passes through.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            # The host in the name: some shared file systems hold locks within one machine only.
            partial = path.with_suffix(f".{socket.gethostname()}.partial")
            with partial.open("wb") as sink:
                write(sink)
                sink.flush()
                os.fsync(sink.fileno())
            partial.replace(path)
    return path


def damage(error: Exception, *, of: Path) -> SourceError | SourceReadError:
    """What to raise where ``of`` could not be unpacked: is it the file, or a disk?"""
    if isinstance(error, OSError) and error.errno:
        return SourceReadError(f"cannot unpack {of}: {error}")
    return SourceError(f"{of} is damaged, fetch it again: {error}")
