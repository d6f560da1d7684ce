"""A file of arrays in a run directory: written whole, or not at all."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from pipeline.errors import StoreError


def write_whole(file: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write ``file`` in place of one that is there; a half-written one has no final name.

    Raises:
        StoreError: the folder or the disk does not take it.
    """
    draft = file.with_name(f".{file.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as sink:
            write(sink)
        draft.replace(file)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise StoreError(
            f"{file} could not be written: {error}; free the disk and run the same command again"
        ) from error
