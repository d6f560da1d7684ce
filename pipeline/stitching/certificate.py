"""The seam certificate: what the mask is worth where tiles meet, as figures. No I/O.

Axes in array names: K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.domain import Sample
from pipeline.stitching.bound import upper_bound

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""How far logits may lie from the reference, in their deviations, by the floats of the run.

Measured of tiles that are sound: at most 8e-6 in fp32. In bf16, which keeps 8 bits layer after
layer, 1.2e-2: what a halo one stride short changes (9e-3) is hidden there.
"""


CRF_SHARE = 0.02
"""Labels after the CRF that may differ within tiles, where a sample's own context ends as well."""

NO_PLACE = (
    "no place was found where tiles that ran meet and all have pixels that get a label: nothing"
    " was measured"
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """One sample as the tiles have it and as it should be."""

    sample: Sample

    reference_KS: NDArray[np.float32]
    """Logits that should be; NaN where no pixel is valid."""

    tiles_KS: NDArray[np.float32]
    """Logits of the tiles, before the CRF; NaN where none were kept."""

    wanted_S: NDArray[Any]
    """Labels that should be, after the CRF where there is one; nodata where not valid."""

    mask_S: NDArray[Any]
    """Labels of the mask."""

    @property
    def valid(self) -> NDArray[np.bool_]:
        """(*S) bool: where the network should have been asked."""
        return np.asarray(~np.isnan(self.reference_KS[0]))

    @property
    def compared(self) -> NDArray[np.bool_]:
        """(*S) bool: where it was."""
        return np.asarray(self.valid & ~np.isnan(self.tiles_KS[0]))

    @property
    def delta(self) -> NDArray[np.float32]:
        """(*S) float32: the greatest difference of a class's logits; 0 where none are compared."""
        delta_KS = np.abs(self.tiles_KS - self.reference_KS)
        return np.where(self.compared, delta_KS.max(axis=0), np.float32(0))

    @property
    def network_differs(self) -> NDArray[np.bool_]:
        """(*S) bool: where another class has the best logit."""
        other_S = self.tiles_KS.argmax(axis=0) != self.reference_KS.argmax(axis=0)
        return np.asarray(other_S & self.compared)

    @property
    def mask_differs(self) -> NDArray[np.bool_]:
        """(*S) bool: where the mask has another label than it should have."""
        other_S: NDArray[np.bool_] = self.mask_S != self.wanted_S
        return np.asarray(other_S & self.compared)

    def clear(self, gap: float) -> NDArray[np.bool_]:
        """(*S) bool: where the two best logits of the reference lie further apart than ``gap``."""
        best_KS = np.sort(self.reference_KS, axis=0)
        return np.asarray(best_KS[-1] - best_KS[-2] > gap)


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Labels that differ."""

    differ: int
    of: int
    """Pixels compared."""

    clear: int
    """Those of ``differ`` that are no near tie."""

    @property
    def share(self) -> float:
        """Of the pixels compared."""
        return self.differ / max(self.of, 1)

    @property
    def upper_95(self) -> float:
        """What the share in the whole scene lies below, in 95 of 100 cases.

        One-sided bound of Clopper and Pearson, for as many independent pixels: 3 / n where none
        differ. Neighbouring pixels are alike, so that it is a bound for scenes like these samples,
        and not for a place that none of them resembles.
        """
        return upper_bound(self.differ, self.of)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """All samples of a kind together."""

    windows: int
    pixels: int
    max_abs_logit: float

    max_deviations: float
    """The same, in deviations of the reference's logits."""

    network: Disagreement
    """Of the best logits, before the CRF."""

    mask: Disagreement
    """Of the mask, after the CRF where there is one."""

    @classmethod
    def of(cls, measured: Sequence[Measured], *, deviation: float, tolerance: float) -> Figures:
        """Measure; near ties are closer than twice the tolerance."""
        largest = max((float(one.delta.max()) for one in measured), default=0.0)
        pixels = sum(int(one.compared.sum()) for one in measured)
        clear = [one.clear(2 * tolerance * deviation) for one in measured]
        network, mask = (
            Disagreement(
                sum(int(part.sum()) for part in parts),
                pixels,
                sum(int((part & far).sum()) for part, far in zip(parts, clear, strict=True)),
            )
            for parts in (
                [one.network_differs for one in measured],
                [one.mask_differs for one in measured],
            )
        )
        return cls(
            windows=len(measured),
            pixels=pixels,
            max_abs_logit=largest,
            max_deviations=largest / deviation if deviation else 0.0,
            network=network,
            mask=mask,
        )

    def as_json(self, *, with_crf: bool) -> dict[str, Any]:
        """Shares are of the mask; before the CRF as well, where there is one.

        None where no pixel was compared.
        """
        values: dict[str, Any] = {
            "max_abs_logit": self.max_abs_logit,
            "max_deviations": self.max_deviations,
            "label_disagreement": self.mask.share,
            "label_disagreement_upper_95": self.mask.upper_95,
        }
        if with_crf:
            values["label_disagreement_before_crf"] = self.network.share
            values["label_disagreement_before_crf_upper_95"] = self.network.upper_95
        if not self.pixels:
            values = dict.fromkeys(values)
        return {"windows": self.windows, "pixels": self.pixels, **values}


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """The verdict on a run, and the figures it rests on."""

    seam: Figures
    interior: Figures

    tolerance: float
    """In deviations of the reference's logits."""

    with_crf: bool

    exact: bool | None
    """Whether what was measured is exact; True for a scene of one tile, which has no seam; None
    where nothing was measured."""

    passed: bool | None
    """Whether the plan keeps what it claims; None where it claims nothing, or nothing tells."""

    reason: str
    """One line: why not, or why nobody knows; empty where it passed."""

    def as_json(self) -> dict[str, Any]:
        """The manifest's ``seam``: figures of the samples astride borders, and the verdict."""
        return {
            **self.seam.as_json(with_crf=self.with_crf),
            "interior": self.interior.as_json(with_crf=self.with_crf),
            "tolerance_deviations": self.tolerance,
            "exact": self.exact,
            "passed": self.passed,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a plan promises of its tiles."""

    samples: int
    """How many were to be measured."""

    one_tile: bool
    """Whether one tile is all of the scene."""

    network_exact: bool
    """Logits agree with one pass over the scene."""

    precision: str
    with_crf: bool


def certify(measured: Sequence[Measured], claim: Claim) -> Certificate:
    """Judge a run by its samples; those that could not be computed again are lacking."""
    tolerance, crf = TOLERANCE[claim.precision], claim.with_crf
    deviation = _deviation(measured)
    seam, interior = (
        Figures.of(
            [one for one in measured if one.sample.kind == kind],
            deviation=deviation,
            tolerance=tolerance,
        )
        for kind in ("seam", "interior")
    )
    both = (seam, interior)
    close = all(part.max_deviations <= tolerance and not part.network.clear for part in both)
    # Within a tile the CRF sees all that matters; astride a border it may differ, and that is told.
    masked = interior.mask.share <= CRF_SHARE if crf else not any(p.mask.clear for p in both)
    close = close and masked
    exact = close and claim.precision == "fp32" and not (crf and seam.mask.differ)
    lacking = claim.samples - len(measured)
    unasked = sum(int((one.valid & ~one.compared).sum()) for one in measured)
    passed: bool | None = None
    if claim.one_tile:
        reason = "the scene is one tile: there is no seam"
    elif not claim.samples:
        reason = NO_PLACE
    elif not close and claim.network_exact:
        passed, reason = False, _fault(both, tolerance=tolerance, crf=crf)
        if crf and not masked:
            reason += f"; the mask differs in {interior.mask.share:.1%} of the labels within tiles"
    elif lacking:
        reason = f"{lacking} of {claim.samples} samples could not be computed again"
    elif unasked:
        reason = f"{unasked} pixels of the samples lie in tiles that failed"
    elif not (seam.pixels and interior.pixels):
        reason = "the samples of one kind hold no valid pixel"
    elif not claim.network_exact:
        reason = "the halo or the context was chosen so that tiles are not exact"
    else:
        passed, reason = True, ""
    known = exact if seam.pixels else (claim.one_tile or None)
    return Certificate(
        seam=seam,
        interior=interior,
        tolerance=tolerance,
        with_crf=crf,
        exact=known,
        passed=passed,
        reason=reason,
    )


def _deviation(measured: Sequence[Measured]) -> float:
    """Of the reference's logits where they are compared; 0.0 where nothing is."""
    parts = [one.reference_KS[:, one.compared].ravel() for one in measured]
    values = np.concatenate(parts) if parts else np.zeros(0)
    return float(values.std(dtype=np.float64)) if values.size else 0.0


def _fault(figures: Sequence[Figures], *, tolerance: float, crf: bool) -> str:
    largest = max(part.max_deviations for part in figures)
    clear = sum(part.network.clear if crf else part.mask.clear for part in figures)
    return (
        f"logits lie up to {largest:.2g} deviations from the whole network's (allowed"
        f" {tolerance:g}), {clear} labels differ that are no near tie"
    )
