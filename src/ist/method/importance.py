"""Learn which layers matter from the losses of candidate sets (eq. 9 and 10): pure functions on a state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ImportanceState", "candidate_rewards", "init_importance", "update_importance"]


@dataclass(frozen=True)
class ImportanceState:
    """What has been learned about the layers."""

    scores: Tensor
    """`I`, float64 of shape `[N_L]` on the CPU; zero before the first update."""
    num_updates: int = 0
    """Importance updates so far."""


def init_importance(num_layers: int) -> ImportanceState:
    """The state before training: all layers alike."""
    return ImportanceState(torch.zeros(num_layers, dtype=torch.float64))


def candidate_rewards(losses: Tensor) -> Tensor:
    """Equation 9 of the paper, the advantage of each candidate set over their mean: `exp(−L_j) − mean_k exp(−L_k)`.

    Args:
        losses: loss of each candidate set in nats, float64 of shape `[N_c]`.

    Returns:
        Rewards of shape `[N_c]`; their sum is 0.
    """
    likelihoods = (-losses).exp()
    return likelihoods - likelihoods.mean()


def update_importance(
    state: ImportanceState,
    candidates: Sequence[Sequence[int]],
    rewards: Tensor,
    mu: float,
    score_step: str = "additive",
) -> ImportanceState:
    """Credit every layer of a candidate set with its reward, equation 10 of the paper: `I_i += μ·r_j` for `i ∈ S_j`.

    With `score_step="sigmoid_gradient"` the increment is `μ·r_j·p_i·(1 − p_i)`, `p = sigmoid(I)`, which slows a score
    down as its layer's probability saturates.

    Args:
        state: the scores so far; unchanged.
        candidates: `N_c` sets of layer indices.
        rewards: float64 of shape `[N_c]`.
        mu: step size `μ`.
        score_step: `additive` or `sigmoid_gradient`.

    Returns:
        The new state.
    """
    scores = state.scores.clone()
    step_sizes = torch.full_like(scores, mu)
    if score_step == "sigmoid_gradient":
        probabilities = state.scores.sigmoid()
        step_sizes *= probabilities * (1 - probabilities)
    for candidate, reward in zip(candidates, rewards, strict=True):
        members = list(candidate)
        scores[members] += step_sizes[members] * reward
    return ImportanceState(scores, state.num_updates + 1)
