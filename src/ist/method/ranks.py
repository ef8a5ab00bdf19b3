"""How a focused training shares its rank among modules: as many parameters as before, in fewer layers. Pure functions.

A module with an adapter of rank `r` has `p = c + d·r` parameters (LoRA: `d = in + out`; DoRA has a constant `c = out`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["RankedModule", "layer_weights", "scaled_alpha", "share_ranks"]

LEAST_SHARE = 0.25
"""Uneven ranks: no layer's weight is below this part of the mean weight."""
SCALING_EXPONENTS = {"sqrt": 0.5, "same": 0.0, "inverse": 1.0}
"""By how much the factor `s` on a response falls when the rank grows: `s' = s · (r'/r)^-e`."""


@dataclass(frozen=True)
class RankedModule:
    """What a module with an adapter costs, and how much rank it can use."""

    rank: int
    """`r` before."""
    parameters_per_rank: float
    """`d`, such as in + out features of LoRA."""
    largest_rank: int
    """The smaller side of its weight; a higher rank adds parameters and nothing that they could express."""


def share_ranks(
    modules: Mapping[str, RankedModule], num_parameters: float, weights: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Ranks `r'_i = min(λ·w_i·r_i, largest_i)`, with the one λ that spends `num_parameters`, rounded down.

    What a module cannot use since its rank stops at its smaller side goes to the others.

    Args:
        modules: the modules of the layers that are kept.
        num_parameters: `Σ d_i·r'_i` to reach, from below.
        weights: `w_i`, positive; None is 1 everywhere.

    Returns:
        The rank of each module, at least 1.
    """
    wanted = {name: module.rank * (1.0 if weights is None else weights[name]) for name, module in modules.items()}
    full = {name for name, module in modules.items() if not wanted[name]}
    factor = 0.0
    while len(full) < len(modules):
        free = set(modules) - full
        left = num_parameters - sum(modules[n].parameters_per_rank * modules[n].largest_rank for n in full)
        factor = max(left, 0.0) / sum(modules[name].parameters_per_rank * wanted[name] for name in free)
        filled = {name for name in free if factor * wanted[name] >= modules[name].largest_rank}
        if not filled:
            break
        full |= filled
    return {
        name: module.largest_rank
        if name in full
        else max(1, min(module.largest_rank, math.floor(factor * wanted[name] + 1e-6)))
        for name, module in modules.items()
    }


def layer_weights(scores: Sequence[float]) -> list[float]:
    """Uneven ranks: the weight of each kept layer, the square root of its score, with mean 1 before the lower bound.

    Scores are squared norms, so their roots are in the units of a gradient. None is below a quarter.
    """
    roots = [math.sqrt(max(score, 0.0)) for score in scores]
    mean = sum(roots) / len(roots)
    return [max(root / mean, LEAST_SHARE) if mean else 1.0 for root in roots]


def scaled_alpha(alpha: float, rank: int, new_rank: int, scaling: str, root_of_rank: bool = False) -> float:
    """The alpha that gives the factor on the response `s' = s·(r'/r)^-e`.

    `s = alpha/r`, or `alpha/√r` for rank-stabilised LoRA (`root_of_rank`), and `e` as in `SCALING_EXPONENTS`.
    """
    exponent = (0.5 if root_of_rank else 1.0) - SCALING_EXPONENTS[scaling]
    value = alpha * (new_rank / rank) ** exponent
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value
