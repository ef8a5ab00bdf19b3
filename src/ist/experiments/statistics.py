"""Means, paired differences and rank correlations with their intervals: numbers in, numbers out."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = [
    "Difference",
    "bootstrap_interval",
    "deviation",
    "kendall_tau",
    "mean",
    "paired_difference",
    "t_quantile",
]


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, with the interval that holds the true one at a given confidence."""

    mean: float
    low: float | None
    """Lower end of the interval; None for a single pair, which says nothing of its own spread."""
    high: float | None
    """Upper end of the interval."""
    num_pairs: int


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("There is no mean of no values: give at least one.")
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """The sample's standard deviation, over `n − 1`; None for a single value."""
    center = mean(values)
    if len(values) < 2:
        return None
    return math.sqrt(math.fsum((value - center) ** 2 for value in values) / (len(values) - 1))


def paired_difference(values: Sequence[float], others: Sequence[float], confidence: float = 0.95) -> Difference:
    """The mean of `values − others`, pair by pair, with the interval of Student's t.

    Pairs share all that is random but the method (seed, data order), so what they share drops out of the difference.

    Args:
        values: one figure for each seed.
        others: the other method's figures, of the same seeds in the same order.
        confidence: how often such intervals hold the true difference, where differences are normally distributed.

    Raises:
        ValueError: the two are not of one length, or empty.
    """
    if len(values) != len(others):
        raise ValueError(f"{len(values)} and {len(others)} values make no pairs: give one of each for every seed.")
    differences = [value - other for value, other in zip(values, others, strict=True)]
    center, spread = mean(differences), deviation(differences)
    if spread is None:
        return Difference(center, None, None, 1)
    half = t_quantile((1 + confidence) / 2, len(differences) - 1) * spread / math.sqrt(len(differences))
    return Difference(center, center - half, center + half, len(differences))


def t_quantile(probability: float, degrees: int) -> float:
    """The value that Student's t with `degrees` degrees of freedom stays below with this probability.

    Raises:
        ValueError: the probability is not within (0, 1), or there is no degree of freedom.
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"probability={probability} and degrees={degrees}: they must be within (0, 1) and at least 1.")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while t_distribution(high, degrees) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_distribution(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def t_distribution(value: float, degrees: int) -> float:
    """P(T ≤ value) of Student's t, from the finite sums that hold for whole degrees of freedom.

    They follow from integrating powers of a cosine by parts, with the angle `atan(value / sqrt(degrees))`.
    """
    angle = math.atan(value / math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2 == 1
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(1 if odd else 0, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    inner = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 + inner) / 2


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b, the rank correlation of two scores of the same things: 1 in one order, −1 in the opposite one.

    Pairs that are tied in one score count for neither order, and lower the greatest value that can be reached by
    less than tau-a does.

    Returns:
        None where one of the scores is the same for all, which orders nothing.

    Raises:
        ValueError: the two are not of one length.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} scores are not of the same things: give one of each for all.")
    score, untied = 0, [0, 0]
    for i in range(len(first)):
        for j in range(i):
            a, b = sign(first[i] - first[j]), sign(second[i] - second[j])
            score += a * b
            untied[0] += abs(a)
            untied[1] += abs(b)
    return score / math.sqrt(untied[0] * untied[1]) if untied[0] and untied[1] else None


def sign(value: float) -> int:
    """−1, 0 or 1."""
    return (value > 0) - (value < 0)


def bootstrap_interval(
    statistic: Callable[[list[int]], float | None],
    num_items: int,
    *,
    confidence: float = 0.95,
    num_draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The interval between the quantiles of a statistic over samples drawn with replacement.

    Args:
        statistic: of the items with these indices, which may repeat; None where it has no value.
        num_items: how many items there are.
        confidence: share of the draws within the interval.
        num_draws: how often to draw.
        seed: of the draws.

    Returns:
        The lower and the upper end; None where fewer than two items leave nothing to draw, or no draw has a value.
    """
    if num_items < 2:
        return None
    generator = random.Random(seed)
    draws = [statistic(generator.choices(range(num_items), k=num_items)) for _ in range(num_draws)]
    values = sorted(value for value in draws if value is not None)
    if not values:
        return None
    tail = (1 - confidence) / 2
    last = len(values) - 1
    return values[math.floor(tail * last)], values[math.ceil((1 - tail) * last)]
