"""What became of one scene or scan of a batch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import PlanError

CaseState = Literal["queued", "running", "done", "failed", "quarantined"]
"""``failed`` is tried again by the next run; ``quarantined`` is not, until something changes."""

_CASE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseRecord:
    """One line of a batch's ledger."""

    case: str
    state: CaseState

    uri: str
    """Where the source lies."""

    stamp: str = ""
    """Paths, sizes and times of the source, hashed: while it stands, so does ``content``."""

    content: str = ""
    """Digest of the source's content; empty where it could not be read."""

    key: str = ""
    """SHA-256 over content, model and options: while it stands, the result does."""

    model: str = ""
    """Name and version of the bundle; empty before one was chosen."""

    output: str = ""
    """The mask's path; empty before the case was begun."""

    output_stamp: str = ""
    """As ``stamp``, of the finished mask."""

    output_sha256: str = ""

    judge: str = ""
    """Digest of the software that gave a verdict: other software judges again."""

    tries: int = 0
    """How often tiles of this key have failed in a row."""

    reason: str = ""
    """One line; empty unless failed, quarantined, or done but for some tiles."""

    seconds: float = 0.0
    """From begin to end, in seconds; other cases ran beside it."""

    tiles: int = 0

    classes: tuple[Mapping[str, object], ...] = ()
    """Per class id, name, pixels and area_m2 or volume_ml."""


def check_case_id(text: str) -> str:
    """``text``, if it can be a file's name anywhere. Raises PlanError.

    >>> check_case_id("S2A_33TWN.2024-05-01")
    'S2A_33TWN.2024-05-01'
    """
    if not _CASE_ID.fullmatch(text) or ".." in text:
        raise PlanError(
            f"case id {text!r} cannot name a file: use up to 128 letters, digits and . _ -,"
            " beginning with a letter or digit, without '..'"
        )
    return text
