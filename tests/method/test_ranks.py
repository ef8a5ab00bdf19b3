"""Ranks of a focused training: the number of parameters stays, ranks stop at the smaller side, alpha follows."""

from __future__ import annotations

import math

import pytest

from ist.method.ranks import RankedModule, layer_weights, scaled_alpha, share_ranks


def test_half_of_equal_layers_have_twice_the_rank() -> None:
    modules = {f"layer.{i}": RankedModule(32, 100, 4096) for i in range(15)}
    assert set(share_ranks(modules, 30 * 32 * 100).values()) == {64}


def test_what_a_small_module_cannot_use_goes_to_the_others() -> None:
    modules = {"k": RankedModule(32, 10, 100), "q": RankedModule(32, 10, 4096)}
    assert share_ranks(modules, 2 * 10 * 32 * 4) == {"k": 100, "q": 156}


@pytest.mark.parametrize("seed", range(3))
def test_the_budget_is_spent_to_one_rank_of_each_module(seed: int) -> None:
    import random

    draw = random.Random(seed)
    modules = {
        str(i): RankedModule(draw.choice([4, 8, 16]), draw.randint(10, 90), draw.randint(20, 300)) for i in range(9)
    }
    weights = {name: draw.uniform(0.3, 2) for name in modules}
    budget = 3 * sum(m.rank * m.parameters_per_rank for m in modules.values())
    ranks = share_ranks(modules, budget, weights)
    spent = sum(modules[name].parameters_per_rank * rank for name, rank in ranks.items())
    assert budget - sum(m.parameters_per_rank for m in modules.values()) <= spent <= budget
    assert all(1 <= rank <= modules[name].largest_rank for name, rank in ranks.items())


def test_more_parameters_than_all_can_use_fill_them() -> None:
    modules = {"a": RankedModule(4, 10, 8), "b": RankedModule(4, 10, 16)}
    assert share_ranks(modules, 1e9) == {"a": 8, "b": 16}


def test_weights_are_roots_with_a_lower_bound() -> None:
    assert layer_weights([1.0, 9.0]) == [0.5, 1.5]
    assert layer_weights([0.0, 4.0]) == [0.25, 2.0]
    assert layer_weights([0.0, -1.0]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("scaling", "root", "alpha"),
    [
        ("sqrt", False, 128),
        ("same", False, 256),
        ("inverse", False, 64),
        ("sqrt", True, 64),
        ("same", True, 128),
        ("inverse", True, 32),
    ],
)
def test_the_factor_on_the_response_follows_the_rule(scaling: str, root: bool, alpha: float) -> None:
    new = scaled_alpha(64, 32, 128, scaling, root)
    assert new == alpha
    exponent = {"sqrt": 0.5, "same": 0, "inverse": 1}[scaling]
    side = math.sqrt if root else float
    assert new / side(128) == pytest.approx(64 / side(32) * 4**-exponent)
