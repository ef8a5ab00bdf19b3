"""Choose sets of layers from importance scores, by the paper's policy (eq. 6 and 7) and by that of the authors' code.

Pure functions. Randomness is keyed: a generator is made afresh from a seed, a purpose and a step, so that a choice
depends on nothing that came before. Every process of a distributed run makes the same choice, and a resumed run the
same as an uninterrupted one, without a generator's state being sent or saved.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

__all__ = [
    "sample_candidates",
    "sample_cost_aware",
    "sample_layers",
    "step_cost",
]

POLICIES = ("uniform", "proportional")

MAX_DRAWS_PER_CANDIDATE = 64
"""Draws from the policy before a distinct candidate set is drawn uniformly (a sharp policy repeats itself)."""

MAX_REJECTIONS = 1000
"""Sets that may be rejected before one is taken whatever it costs; at the highest exponent one of 256 is accepted."""


def sample_layers(
    importance: Tensor, num_layers: int, generator: torch.Generator, policy: str = "uniform"
) -> tuple[int, ...]:
    """Draw a set of layers, the more important ones more often.

    `uniform`: equation 6 of the paper, `p_i ~ U(0, sigmoid(I_i))`, and equation 7 of the paper, the set of the
    `num_layers` largest `p_i`.
    `proportional`: one after the other without replacement, with probability proportional to `sigmoid(I_i)`; drawn as
    the largest `log sigmoid(I_i) + G_i` with Gumbel noise `G_i`, which has that distribution.

    Args:
        importance: scores `I`, float64 of shape `[N_L]`.
        num_layers: how many to draw, from 1 to `N_L`.
        generator: source of the randomness; advanced by `N_L` uniform numbers.
        policy: `uniform` or `proportional`.

    Returns:
        Layer indices in ascending order.

    Raises:
        ValueError: the policy is unknown.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} is unknown: choose one of {', '.join(map(repr, POLICIES))}.")
    uniform = torch.rand(len(importance), generator=generator, dtype=torch.float64)
    # Logarithms keep the order of eq. 6 and do not underflow at the scores that a large mu reaches. For so few
    # numbers plain Python is faster than tensors.
    noise = [log(number) if policy == "uniform" else -log(-log(number)) for number in uniform.tolist()]
    keys = [log_sigmoid(score) + own for score, own in zip(importance.tolist(), noise, strict=True)]
    return tuple(sorted(sorted(range(len(keys)), key=keys.__getitem__, reverse=True)[:num_layers]))


def log(value: float) -> float:
    """The logarithm, -inf of 0."""
    return math.log(value) if value else -math.inf


def log_sigmoid(value: float) -> float:
    """`log sigmoid(value)`, without overflow."""
    return min(value, 0.0) - math.log1p(math.exp(-abs(value)))


def step_cost(layers: Collection[int], num_layers: int) -> float:
    """What a step that trains `layers` costs, in that of a step down to the first layer: all layers run forward, and
    the backward goes down to the lowest one of the set, which makes `1 − lowest / (2 N_L)`.

    The forward and the backward to the activations are taken to cost the same, as they do in LoRA where the products
    with the base weights count alone.
    """
    return 1 - min(layers) / (2 * num_layers)


def sample_cost_aware(
    importance: Tensor, num_layers: int, generator: torch.Generator, policy: str = "uniform", cost_exponent: float = 0.0
) -> tuple[int, ...]:
    """Draw a set of layers with the probability that the policy gives it, times `cost^-cost_exponent`.

    Exactly so, by rejection: a set of the policy is taken with probability
    `(lowest possible cost / its cost)^cost_exponent`.
    This is no part of the paper. It makes steps cheaper by training upper layers more often and low ones less than
    their importance says: at an exponent of 1 by little, since most sets reach far down.

    Args:
        importance: scores `I`, float64 of shape `[N_L]`.
        num_layers: how many to draw, from 1 to `N_L`.
        generator: source of the randomness.
        policy: see `sample_layers`.
        cost_exponent: exponent of the cost, at least 0; 0 is the policy itself.
    """
    total = len(importance)
    drawn = sample_layers(importance, num_layers, generator, policy)
    if cost_exponent:
        lowest_cost = step_cost(range(total - num_layers, total), total)
        for _ in range(MAX_REJECTIONS):
            accepted = (lowest_cost / step_cost(drawn, total)) ** cost_exponent
            if float(torch.rand((), generator=generator, dtype=torch.float64)) < accepted:
                break
            drawn = sample_layers(importance, num_layers, generator, policy)
    return drawn


def sample_candidates(
    importance: Tensor, num_layers: int, num_candidates: int, generator: torch.Generator, policy: str = "uniform"
) -> tuple[tuple[int, ...], ...]:
    """Draw distinct candidate sets of `num_layers` layers each by the policy of the fine-tuning loop.

    Where fewer than `num_candidates` distinct sets exist, all of them are drawn. Scores can be so far apart that the
    policy draws one set for ever: after `MAX_DRAWS_PER_CANDIDATE` draws a set is drawn from all sets uniformly.

    Returns:
        Distinct sets of layer indices, each in ascending order.
    """
    wanted = min(num_candidates, math.comb(len(importance), num_layers))
    candidates: list[tuple[int, ...]] = []
    num_draws = 0
    while len(candidates) < wanted:
        num_draws += 1
        stuck = num_draws > MAX_DRAWS_PER_CANDIDATE * wanted
        scores = torch.zeros_like(importance) if stuck else importance
        candidate = sample_layers(scores, num_layers, generator, policy)
        if candidate not in candidates:
            candidates.append(candidate)
    return tuple(candidates)
