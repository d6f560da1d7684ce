"""The certificate's arithmetic, on samples written by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import beta

from pipeline.domain import Region, Sample
from pipeline.stitching.bound import upper_bound
from pipeline.stitching.certificate import Certificate, Claim, Measured, certify

CLAIM = Claim(samples=2, one_tile=False, network_exact=True, precision="fp32", with_crf=False)


def measured(kind: str, *, seed: int = 0) -> Measured:
    """8 x 8 px of three classes, the first column invalid, tiles as they should be."""
    logits_KYX = np.random.default_rng(seed).normal(size=(3, 8, 8)).astype(np.float32)
    labels_YX = logits_KYX.argmax(axis=0).astype(np.uint8)
    logits_KYX[:, :, 0], labels_YX[:, 0] = np.nan, 255
    return Measured(
        sample=Sample(kind, Region((0, 0), (8, 8))),  # type: ignore[arg-type]
        reference_KS=logits_KYX,
        tiles_KS=logits_KYX.copy(),
        wanted_S=labels_YX,
        mask_S=labels_YX.copy(),
    )


@pytest.fixture
def pair() -> tuple[Measured, Measured]:
    return measured("seam"), measured("interior", seed=1)


def judged(pair: tuple[Measured, Measured], **changes: object) -> Certificate:
    return certify(pair, replace(CLAIM, **changes))  # type: ignore[arg-type]


def test_equal_samples_pass(pair: tuple[Measured, Measured]) -> None:
    """A sound run would be complained of."""
    found = judged(pair)
    assert (found.exact, found.passed, found.reason) == (True, True, "")
    assert (found.seam.windows, found.seam.pixels, found.seam.max_abs_logit) == (1, 56, 0.0)
    assert found.seam.mask.upper_95 == pytest.approx(3 / 56, rel=0.05)


@pytest.mark.parametrize("which", [0, 1])
def test_a_logit_that_is_off_fails(pair: tuple[Measured, Measured], which: int) -> None:
    """Astride a border it is a halo, within a tile it is normalisation or the origin."""
    pair[which].tiles_KS[0, 3, 4] += 1e-3
    found = judged(pair)
    assert found.passed is False
    assert found.exact is False
    assert "0.001" in found.reason or "deviations" in found.reason
    figures = (found.seam, found.interior)[which]
    assert figures.max_abs_logit == pytest.approx(1e-3, rel=1e-3)
    assert (found.interior, found.seam)[which].max_abs_logit == 0.0


def test_a_mask_unlike_the_logits_fails_unless_a_crf_made_it(
    pair: tuple[Measured, Measured],
) -> None:
    """The file is what people have: good logits under a wrong mask are no excuse."""
    seam = pair[0]
    row, column = 2, 5
    seam.mask_S[row, column] = (seam.mask_S[row, column] + 1) % 3
    found = judged(pair)
    assert (found.passed, found.exact, found.seam.mask.differ) == (False, False, 1)
    assert found.seam.mask.share == 1 / 56
    refined = judged(pair, with_crf=True)
    assert (refined.passed, refined.exact) == (True, False), "the network keeps its promise"
    assert refined.as_json()["label_disagreement"] == 1 / 56
    assert refined.as_json()["label_disagreement_before_crf"] == 0.0


def test_a_label_may_differ_where_two_classes_nearly_tie(
    pair: tuple[Measured, Measured],
) -> None:
    """Rounding decides there: a run would fail by chance."""
    seam = pair[0]
    seam.reference_KS[:, 1, 1] = (2.0, 2.0 - 1e-5, 0.0)
    seam.tiles_KS[:, 1, 1] = (2.0 - 1e-5, 2.0, 0.0)
    seam.wanted_S[1, 1], seam.mask_S[1, 1] = 0, 1
    found = judged(pair)
    assert (found.passed, found.exact) == (True, True)
    assert (found.seam.network.differ, found.seam.mask.differ) == (1, 1)


def test_nobody_fails_who_promised_nothing(pair: tuple[Measured, Measured]) -> None:
    """A halo chosen short is measured and stated; its run is not broken."""
    pair[0].tiles_KS[0] += 1.0
    found = judged(pair, network_exact=False)
    assert (found.passed, found.exact) == (None, False)
    assert found.seam.max_abs_logit == pytest.approx(1.0)
    assert "chosen" in found.reason


def test_what_could_not_be_compared_is_no_pass(pair: tuple[Measured, Measured]) -> None:
    """A run whose samples were lost would carry a certificate of nothing."""
    assert certify(pair[:1], CLAIM).passed is None
    pair[1].tiles_KS[:, 4:] = np.nan
    found = judged(pair)
    assert found.passed is None
    assert "28 pixels" in found.reason
    nothing = certify([], CLAIM)
    assert (nothing.passed, nothing.exact) == (None, None)
    assert nothing.as_json()["max_abs_logit"] is None


def test_one_tile_has_no_seam() -> None:
    """It would be called unknown, although there is nothing to know."""
    found = certify([], replace(CLAIM, samples=0, one_tile=True))
    assert (found.exact, found.passed) == (True, None)
    assert "one tile" in found.reason


def test_bf16_is_held_to_what_bf16_can_do_and_never_called_exact(
    pair: tuple[Measured, Measured],
) -> None:
    """Eight bits are not exact; held to fp32's measure every such run would fail."""
    pair[0].tiles_KS[0, 3, 4] += 1e-3
    found = judged(pair, precision="bf16")
    assert (found.passed, found.exact) == (True, False)


@pytest.mark.parametrize(("count", "of"), [(0, 4096), (1, 10), (300, 4096), (9, 9), (2000, 50000)])
def test_the_upper_bound_is_that_of_clopper_and_pearson(count: int, of: int) -> None:
    """A bound that is too low promises more than was measured."""
    wanted = float(beta.ppf(0.95, count + 1, of - count)) if count < of else 1.0
    assert upper_bound(count, of) == pytest.approx(wanted, rel=1e-9)
