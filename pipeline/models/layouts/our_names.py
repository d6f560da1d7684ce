"""What the parts of our v3 and v3+ are called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.models.architecture import Architecture


@dataclass(frozen=True, slots=True)
class Head:
    """Names of the parts of a head, for a layout to give its own."""

    architecture: Architecture

    @property
    def encoder(self) -> str:
        """ASPP and what smooths it."""
        return "classifier" if self.architecture.decoder is None else "classifier.encoder"

    @property
    def aspp(self) -> str:
        """ASPP."""
        return f"{self.encoder}.0"

    @property
    def image_pool(self) -> str:
        """The branch of ASPP that pools; 1 is its convolution and 2 its norm."""
        return f"{self.aspp}.convs.{1 + len(self.architecture.rates)}"

    @property
    def last(self) -> str:
        """The convolution that gives scores."""
        if self.architecture.decoder is not None:
            return "classifier.classify"
        return f"classifier.{1 + (self.mixed if self.architecture.smooth else 0)}"

    @property
    def mixed(self) -> int:
        """Layers that make a 3x3 convolution, its norm and its ReLU."""
        return {None: 3, "bare": 4, "normed": 6}[self.architecture.separable]

    def mixes(self, prefix: str, *, first: int = 0) -> dict[str, str]:
        """The layers of weight in a 3x3 convolution, from ``prefix.first`` on, by what they are.

        ``conv`` and ``bn``; or of one in two parts ``depthwise``, ``pointwise``, and their norms
        ``depthwise bn`` (where they have one) and ``pointwise bn``.
        """
        kinds = {
            None: ("conv", "bn"),
            "bare": ("depthwise", "pointwise", "pointwise bn"),
            "normed": ("depthwise", "depthwise bn", "", "pointwise", "pointwise bn"),
        }[self.architecture.separable]
        return {kind: f"{prefix}.{first + n}" for n, kind in enumerate(kinds) if kind}

    def branches(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Number and layers of each 3x3 branch of ASPP, from 1."""
        for number in range(1, 1 + len(self.architecture.rates)):
            yield number, self.mixes(f"{self.aspp}.convs.{number}")

    def fuses(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Number and layers of each 3x3 convolution of the decoder, from 0."""
        decoder = self.architecture.decoder
        for number in range(len(decoder.widths) if decoder else 0):
            yield number, self.mixes("classifier.fuse", first=number * self.mixed)
