"""The layers that a focused training keeps: against brute force, at the ends, and refusals."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from ist.method.spreading import (
    best_with_distance,
    choose_layers,
    default_distances,
    default_num_layers,
    evenly_spread,
    lowest_layer,
)


def brute_force(scores: list[float], num: int, least: int, largest: int) -> float | None:
    sums = []
    for chosen in itertools.combinations(range(len(scores)), num):
        gaps = [b - a for a, b in itertools.pairwise(chosen)]
        ends = chosen[0] < largest and len(scores) - chosen[-1] <= largest
        if ends and all(least <= gap <= largest for gap in gaps):
            sums.append(sum(scores[i] for i in chosen))
    return max(sums, default=None)


@pytest.mark.parametrize("seed", range(4))
def test_distance_equals_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(60):
        total = draw.randint(1, 11)
        num = draw.randint(1, total)
        least = draw.randint(1, 4)
        largest = draw.randint(least, 6)
        scores = [draw.uniform(-1, 1) for _ in range(total)]
        expected = brute_force(scores, num, least, largest)
        if expected is None:
            with pytest.raises(ValueError, match="layers have neighbours"):
                best_with_distance(scores, num, least, largest)
        else:
            chosen = best_with_distance(scores, num, least, largest)
            assert len(chosen) == num
            assert sum(scores[i] for i in chosen) == pytest.approx(expected, abs=1e-12)
            assert all(least <= b - a <= largest for a, b in itertools.pairwise(chosen))


def test_parts_take_neighbours_across_a_border_and_distance_does_not() -> None:
    scores = [0, 0, 0, 9, 8, 0.5, 0, 0, 0, 1, 0, 0]
    assert choose_layers(scores, 3, "parts") == (3, 4, 9)
    assert choose_layers(scores, 3, "distance") == (3, 5, 9)
    assert choose_layers(scores, 3, "anywhere") == (3, 4, 9)
    assert choose_layers([0.0] * 12, 3, "even") == (2, 6, 10)


@pytest.mark.parametrize("total", range(1, 41))
def test_an_even_spread_satisfies_the_default_distances(total: int) -> None:
    for num in range(1, total + 1):
        least, largest = default_distances(total, num)
        even = evenly_spread(total, num)
        assert len(set(even)) == num
        assert even[0] < largest
        assert total - even[-1] <= largest
        assert all(least <= b - a <= largest for a, b in itertools.pairwise(even))
        assert len(choose_layers([1.0] * total, num, "distance")) == num
        assert len(set(choose_layers([1.0] * total, num, "parts"))) == num


def test_each_part_gives_one_layer() -> None:
    scores = [random.Random(3).random() for _ in range(30)]
    chosen = choose_layers(scores, 8, "parts")
    borders = [part * 30 // 8 for part in range(9)]
    assert [sum(a <= layer < b for layer in chosen) for a, b in itertools.pairwise(borders)] == [1] * 8


@pytest.mark.parametrize(("num_layers", "half"), [(1, 1), (2, 1), (24, 12), (30, 15), (31, 16)])
def test_the_default_is_half(num_layers: int, half: int) -> None:
    assert default_num_layers(num_layers) == half


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], 3), "num_layers=3"),
        (([1.0, 2.0], 0), "num_layers=0"),
        (([1.0, 2.0], True), "num_layers=True"),
        (([1.0, 2.0], 1, "far"), "spread='far'"),
        (([1.0, float("nan")], 1), "layer 1 is nan"),
    ],
)
def test_refusals_are_one_line(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        choose_layers(*arguments)
    assert "\n" not in str(refusal.value)


def test_distances_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="no effect"):
        choose_layers([1.0, 2.0], 1, "parts", least_distance=2)


@pytest.mark.parametrize(
    ("spread", "expected"),
    [("parts", (4, 9, 11)), ("distance", (4, 6, 10)), ("even", (4, 7, 10)), ("anywhere", (4, 9, 11))],
)
def test_the_lowest_part_is_left_out_and_the_set_spread_over_the_rest(spread: Any, expected: tuple[int, ...]) -> None:
    scores = [99, 98, 97, 9, 8, 0, 1, 0, 0, 3, 2, 5]
    assert choose_layers(scores, 3, spread, lowest=3) == tuple(3 + i for i in choose_layers(scores[3:], 3, spread))
    assert choose_layers(scores, 3, spread, lowest=4)[0] >= 4
    if spread in ("even", "anywhere"):
        assert choose_layers(scores, 3, spread, lowest=4 if spread == "anywhere" else 3) == expected


@pytest.mark.parametrize(
    ("min_depth", "total", "expected"), [(0, 5, 0), (0.25, 24, 6), (0.25, 30, 8), (0.1, 4, 0), (1 / 3, 24, 8)]
)
def test_a_fraction_of_the_depth_is_rounded_to_layers(min_depth: float, total: int, expected: int) -> None:
    assert lowest_layer(min_depth, total, 1) == expected


@pytest.mark.parametrize("min_depth", [-0.1, 1, 1.5, float("nan"), True, "low"])
def test_what_is_no_fraction_of_the_depth_is_refused(min_depth: Any) -> None:
    with pytest.raises(ValueError, match=r"min_depth=.* is no fraction of the depth: give 0"):
        lowest_layer(min_depth, 12, 1)


def test_enough_layers_have_to_be_left() -> None:
    assert lowest_layer(0.5, 12, 6) == 6
    with pytest.raises(ValueError, match=r"min_depth=0\.75 leaves 3 of 12 layers, and 6 are to be kept: lower"):
        lowest_layer(0.75, 12, 6)
