"""Which layers of a trained adapter matter: the losses without them, one by one and greedily, and what they say.

The studies are those of the paper's figure 2. Layers are taken out by suppressing their adapters' response to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.layers import Layer
from ..probing.repeats import with_own_batch
from ..probing.suppression import LossFunction, candidate_losses, model_loss
from .statistics import bootstrap_interval, kendall_tau

__all__ = [
    "MIN_BATCHES",
    "batch_weights",
    "have_moved",
    "importance_intervals",
    "loss_increases",
    "losses_without",
    "rank_correlation",
    "removal_order",
    "weighted_mean",
]

MIN_BATCHES = 5
"""A bootstrap over fewer batches has too few different samples to give an interval."""

LEAST_SPREAD = 1e-3
"""Of `sigmoid(I)` between the highest and the lowest score; below it, choices are as good as uniform."""


def losses_without(
    model: nn.Module,
    layers: Sequence[Layer],
    removed: Sequence[Collection[int]],
    batches: Iterable[Mapping[str, Any]],
    beta: float = 0.0,
    loss_function: LossFunction = model_loss,
) -> Tensor:
    """The losses of a model while sets of its layers go without their adapters' response.

    Args:
        model: with trained adapters; it is left as it was.
        layers: all layers that carry adapters.
        removed: sets of layers whose response is multiplied by `beta`.
        batches: validation batches on the model's device.
        beta: 0 takes the response out, 0.25 suppresses it as the paper's importance loop does.
        loss_function: `(model, batch) -> loss` in nats.

    Returns:
        Losses in nats, float64 of shape `[batches, sets]`.
    """
    everything = {layer.index for layer in layers}
    kept = [everything - set(taken) for taken in removed]
    loss_of = with_own_batch(loss_function)
    return torch.stack([candidate_losses(model, layers, kept, batch, beta, loss_of) for batch in batches])


def batch_weights(batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """How much each batch's mean loss counts, float64 `[batches]`: by its predicted tokens where labels tell."""
    counts = [
        float((batch["labels"][..., 1:] != -100).sum()) if isinstance(batch.get("labels"), Tensor) else 1.0
        for batch in batches
    ]
    return torch.tensor(counts, dtype=torch.float64)


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """The mean over batches: `[batches, …] -> […]`."""
    return torch.tensordot(weights / weights.sum(), losses, dims=1)


def loss_increases(losses: Tensor, weights: Tensor) -> Tensor:
    """True importance of each layer: how much the loss rises without its response.

    Args:
        losses: `[batches, 1 + layers]`, the first column with all layers, the others each without one.
        weights: of the batches.

    Returns:
        Nats, float64 `[layers]`.
    """
    return weighted_mean(losses[:, 1:] - losses[:, :1], weights)


def importance_intervals(losses: Tensor, weights: Tensor, seed: int = 0) -> list[tuple[float, float]] | None:
    """The 95% interval of each layer's importance, by a bootstrap over batches; None for fewer than `MIN_BATCHES`.

    Args:
        losses: as for `loss_increases`.
        weights: of the batches.
        seed: of the draws.
    """

    def of_layer(layer: int) -> tuple[float, float] | None:
        columns = losses[:, [0, 1 + layer]]
        return bootstrap_interval(lambda drawn: float(loss_increases(columns[drawn], weights[drawn])), n, seed=seed)

    n = len(losses)
    if n < MIN_BATCHES:
        return None
    intervals = [interval for layer in range(losses.shape[1] - 1) if (interval := of_layer(layer)) is not None]
    return intervals or None


def have_moved(learned: Sequence[float]) -> bool:
    """Whether learned scores say anything: whether the policy, which sees `sigmoid(I)`, tells one layer from another.

    Scores of losses too high for `exp(−L)` stay so near to 0 that their order is that of rounding errors.
    """
    seen = [0.5 * (1 + math.tanh(score / 2)) for score in learned]
    return max(seen, default=0.0) - min(seen, default=0.0) >= LEAST_SPREAD


def rank_correlation(losses: Tensor, weights: Tensor, learned: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """How alike the true importance orders the layers and what was learned of them.

    Args:
        losses: as for `loss_increases`.
        weights: of the batches.
        learned: a score for each layer.
        seed: of the bootstrap over batches, which says how sure the true order is; the learned scores stay as they are.

    Returns:
        `tau` (Kendall's tau-b), and `low` and `high`, the ends of its 95% interval; None where there is no value: of an
        interval from fewer than `MIN_BATCHES`, and of all three where the learned scores never moved.
    """
    if not have_moved(learned):
        return {"tau": None, "low": None, "high": None}

    def tau(drawn: list[int]) -> float | None:
        return kendall_tau(loss_increases(losses[drawn], weights[drawn]).tolist(), learned)

    enough = len(losses) >= MIN_BATCHES
    interval = (bootstrap_interval(tau, len(losses), seed=seed) if enough else None) or (None, None)
    return {"tau": tau(list(range(len(losses)))), "low": interval[0], "high": interval[1]}


def removal_order(
    num_layers: int, measure: Callable[[list[list[int]]], Sequence[float]], most_important_first: bool
) -> list[int]:
    """The order in which a greedy search takes all layers out: of those left, always the one whose absence raises the
    loss least, or most.

    Args:
        num_layers: how many layers there are.
        measure: sets of removed layers -> their losses.
        most_important_first: take the one that raises the loss most instead.
    """
    removed: list[int] = []
    while len(removed) < num_layers:
        left = [layer for layer in range(num_layers) if layer not in removed]
        losses = list(measure([[*removed, layer] for layer in left])) if len(left) > 1 else [0.0]
        removed.append(left[losses.index(max(losses) if most_important_first else min(losses))])
    return removed
