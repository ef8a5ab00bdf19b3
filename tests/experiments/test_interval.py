"""Wilson's interval."""

from __future__ import annotations

import pytest

from ist.experiments.evaluation import wilson_interval


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"), [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]
)
def test_values_of_the_literature(correct: int, total: int, low: float, high: float) -> None:
    """Newcombe (1998), table I, method 3."""
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (1, 2), (33, 60), (1300, 1319), (10042, 10042)])
def test_against_scipy(correct: int, total: int, confidence: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(correct, total).proportion_ci(confidence, method="wilson")
    assert wilson_interval(correct, total, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)
    low, high = wilson_interval(correct, total, confidence)
    assert 0 <= low <= correct / total <= high <= 1


@pytest.mark.parametrize(
    ("correct", "total", "confidence"), [(0, 0, 0.95), (-1, 3, 0.95), (4, 3, 0.95), (1, 3, 95), (1, 3, 0)]
)
def test_what_is_no_share_is_refused(correct: int, total: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=r"is no share|is not between 0 and 1"):
        wilson_interval(correct, total, confidence)
