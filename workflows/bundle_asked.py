"""Which bundle a command means."""

from __future__ import annotations

from pathlib import Path

from pipeline.models.bundle import Bundle, load_bundle
from workflows.config import SegmentOptions


def bundle_asked(path: str | Path, options: SegmentOptions) -> Bundle:
    """The bundle, at the output stride that was asked for. Raises BundleError.

    At another stride it is another network: the digest says so, and no run goes on with it.
    """
    bundle = load_bundle(path)
    return bundle if options.output_stride is None else bundle.at_stride(options.output_stride)
