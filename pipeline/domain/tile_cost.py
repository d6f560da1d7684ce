"""What a tile takes: of time, and of memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TileCost:
    """Of one tile in one worker."""

    work: int
    """Multiply-adds of the convolutions."""

    device_bytes: int
    """Peak of image, maps and logits where the network runs, its weights left out."""

    host_bytes: int
    """Peak of what reader, CRF and writer hold at the same time, in the host's memory."""
