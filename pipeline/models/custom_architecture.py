"""Somebody's own network: the ``architecture`` part of a bundle of family ``custom``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.domain import Halo
from pipeline.errors import BundleError


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomArchitecture:
    """A network of which nothing is known but what it takes and gives.

    It takes (B, bands, *S) and gives (B, classes, *S / n) logits for one whole n.
    """

    family: Literal["custom"]

    dims: int
    """Number of spatial axes: 2 or 3."""

    output_stride: int
    """Pixels by which the input must move for the output to move alike, and no others.

    For a U-Net 2 to the number of its halvings. The sides of what the network is given are
    multiples of it.
    """

    entry_point: str | None = None
    """``package.module:factory`` of what is installed; None: the bundle holds a program."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the factory."""

    halo: Halo | None = None
    """What a probe found, in pixels, so that it need not be found again: a deep network takes
    minutes. None: every plan probes, and a network that is GLOBAL has none."""

    def __post_init__(self) -> None:
        if self.dims not in (2, 3):
            raise BundleError(f"a network has 2 or 3 spatial axes, dims is {self.dims}")
        if self.output_stride < 1:
            raise BundleError(f"output_stride is at least 1 px, got {self.output_stride}")
        if self.entry_point is None and self.arguments:
            raise BundleError("arguments are an entry point's: a program takes none")
        if self.entry_point is not None and not _is_entry_point(self.entry_point):
            raise BundleError(
                f"entry_point {self.entry_point!r} must be of the form package.module:factory"
            )

        if self.halo is not None and len(self.halo.before) != self.dims:
            raise BundleError(f"halo has {len(self.halo.before)} axes, the network {self.dims}")

    @property
    def squeezes(self) -> bool:
        """Whether a layer is known by name to take means over all that is read: the probe finds."""
        return False

    @property
    def pools(self) -> bool:
        """Whether it pools as ASPP does, over a window that can be set: never."""
        return False

    @property
    def windowed(self) -> bool:
        """As ``pools``."""
        return False


def _is_entry_point(text: str) -> bool:
    """Whether it names a module and something in it.

    >>> _is_entry_point("monai.networks.nets:UNet"), _is_entry_point("nets.UNet")
    (True, False)
    """
    module, _, factory = text.partition(":")
    names = [*module.split("."), *factory.split(".")]
    return all(name.isidentifier() for name in names)
