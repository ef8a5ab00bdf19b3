"""Statistics, against printed tables and values worked out by hand."""

from __future__ import annotations

import math
import random

import pytest

from ist.experiments.statistics import (
    bootstrap_interval,
    deviation,
    kendall_tau,
    mean,
    paired_difference,
    t_distribution,
    t_quantile,
)


@pytest.mark.parametrize(
    ("degrees", "probability", "printed"),
    [
        (1, 0.975, 12.706),
        (2, 0.975, 4.303),
        (3, 0.975, 3.182),
        (4, 0.975, 2.776),
        (5, 0.975, 2.571),
        (9, 0.975, 2.262),
        (10, 0.975, 2.228),
        (30, 0.975, 2.042),
        (120, 0.975, 1.980),
        (1, 0.95, 6.314),
        (4, 0.95, 2.132),
        (4, 0.995, 4.604),
        (7, 0.9, 1.415),
        (7, 0.1, -1.415),
        (3, 0.5, 0.0),
    ],
)
def test_t_as_printed_tables_have_it(degrees: int, probability: float, printed: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(printed, abs=6e-4)


def test_t_in_closed_form() -> None:
    """One degree of freedom is Cauchy's distribution; two have a root in closed form."""
    for value in (-3.0, -0.5, 0.0, 1.0, 7.0):
        assert t_distribution(value, 1) == pytest.approx(0.5 + math.atan(value) / math.pi, abs=1e-15)
        assert t_distribution(value, 2) == pytest.approx(0.5 + value / (2 * math.sqrt(2 + value**2)), abs=1e-15)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 8])
def test_t_is_the_integral_of_its_density(degrees: int) -> None:
    factor = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    width, steps = 1.7, 4000
    heights = [factor * (1 + (width * (k + 0.5) / steps) ** 2 / degrees) ** (-(degrees + 1) / 2) for k in range(steps)]
    assert t_distribution(width, degrees) == pytest.approx(0.5 + sum(heights) * width / steps, abs=1e-7)


@pytest.mark.parametrize(("probability", "degrees"), [(0, 3), (1, 3), (1.5, 3), (0.9, 0)])
def test_t_of_what_has_none(probability: float, degrees: int) -> None:
    with pytest.raises(ValueError, match=r"must be within \(0, 1\) and at least 1"):
        t_quantile(probability, degrees)


def test_mean_and_deviation() -> None:
    assert mean([1, 2, 3, 6]) == 3
    assert deviation([1, 2, 3, 6]) == pytest.approx(math.sqrt(14 / 3))  # 4 + 1 + 0 + 9 over 3
    assert deviation([5.0]) is None
    with pytest.raises(ValueError, match="no mean of no values"):
        mean([])


def test_a_paired_difference_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, deviation 1, half width 4.3027 / √3 = 2.4841."""
    found = paired_difference([11, 22, 33], [10, 20, 30])
    assert (found.mean, found.num_pairs) == (2, 3)
    assert found.low == pytest.approx(2 - 2.48414, abs=1e-4)
    assert found.high == pytest.approx(2 + 2.48414, abs=1e-4)


def test_what_pairs_share_drops_out() -> None:
    noise = [random.Random(seed).gauss(0, 100) for seed in range(5)]
    found = paired_difference([n + 1.0 for n in noise], noise)
    assert found.mean == pytest.approx(1)
    assert found.low == pytest.approx(1)


def test_a_single_pair_has_no_interval() -> None:
    found = paired_difference([3.0], [1.0])
    assert (found.mean, found.low, found.high, found.num_pairs) == (2.0, None, None, 1)


def test_what_makes_no_pairs() -> None:
    with pytest.raises(ValueError, match="2 and 1 values make no pairs"):
        paired_difference([1, 2], [1])


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = random.Random(0)
    held = 0
    for _ in range(2000):
        found = paired_difference([generator.gauss(1, 2) for _ in range(5)], [0.0] * 5)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 1 <= found.high
    assert 0.935 < held / 2000 < 0.965


@pytest.mark.parametrize(
    ("first", "second", "tau"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1),
        ([1, 2, 3, 4], [1, 2, 4, 3], 4 / 6),  # five pairs agree and one does not
        ([1, 2, 3], [1, 1, 2], 2 / math.sqrt(3 * 2)),  # one tie in the second
        ([1, 1, 2], [1, 1, 2], 1),  # tied in both: tau-b still reaches 1
        ([1, 1, 1], [1, 2, 3], None),
        ([1], [1], None),
    ],
)
def test_kendalls_tau(first: list[float], second: list[float], tau: float | None) -> None:
    assert kendall_tau(first, second) == (None if tau is None else pytest.approx(tau))
    assert kendall_tau(second, first) == kendall_tau(first, second)


def test_scores_of_different_things() -> None:
    with pytest.raises(ValueError, match="3 and 2 scores are not of the same things"):
        kendall_tau([1, 2, 3], [1, 2])


def test_a_bootstrap_of_a_mean_is_close_to_the_normal_interval() -> None:
    generator = random.Random(1)
    values = [generator.gauss(0, 1) for _ in range(400)]
    interval = bootstrap_interval(lambda drawn: mean([values[i] for i in drawn]), len(values))
    assert interval is not None
    half = 1.96 * (deviation(values) or 0) / 20
    assert interval[0] == pytest.approx(mean(values) - half, abs=0.015)
    assert interval[1] == pytest.approx(mean(values) + half, abs=0.015)
    assert interval == bootstrap_interval(lambda drawn: mean([values[i] for i in drawn]), len(values))


@pytest.mark.parametrize(("num_items", "value"), [(1, 1.0), (5, None)])
def test_a_bootstrap_without_a_value(num_items: int, value: float | None) -> None:
    assert bootstrap_interval(lambda drawn: value, num_items) is None
