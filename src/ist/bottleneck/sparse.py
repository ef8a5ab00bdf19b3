"""Adapters of which most weights are pruned before training, after SparseAdapter (He et al., EMNLP Findings 2022).

A pruned weight is exactly zero and stays so: the forward reads weights through a mask, so no gradient reaches it, and
an optimizer has nothing to move, with weight decay and momentum either. The mask is a persistent buffer: it is saved
and loaded with the adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import is_number

__all__ = ["SparseLinear", "check_sparsity", "kept", "sparse_pair"]

PRUNINGS = ("random", "magnitude", "snip")


class SparseLinear(nn.Linear):
    """A linear map without bias, of whose weights only those under its `mask` exist: `x (m ⊙ W)`.

    Args:
        linear: the map to prune, without bias; its parameter object becomes this module's. All weights are kept
            until `prune`.
    """

    mask: Tensor
    """True where a weight is kept, of the weight's shape."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.register_buffer("mask", torch.ones_like(linear.weight, dtype=torch.bool))

    @torch.no_grad()
    def prune(self, mask: Tensor) -> None:
        """Keep the weights under `mask`; the others are zero from now on."""
        self.mask.copy_(mask)
        self.weight.masked_fill_(~self.mask, 0)

    def forward(self, input: Tensor) -> Tensor:
        # `where` rather than a product: a gradient that is not finite must not reach a pruned weight as 0 · inf.
        return functional.linear(input, torch.where(self.mask, self.weight, 0))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kept={int(self.mask.sum())}" if not self.mask.is_meta else super().extra_repr()


def kept(scores: Tensor, sparsity: float) -> Tensor:
    """A mask of the shape of `scores`, False at the `round(sparsity · n)` smallest of the n scores, at most n - 1."""
    num_pruned = min(round(sparsity * scores.numel()), scores.numel() - 1)
    pruned = torch.topk(scores.flatten(), num_pruned, largest=False).indices
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[pruned] = False
    return mask.view_as(scores)


def sparse_pair(down: nn.Linear, up: nn.Linear, *, sparsity: float, pruning: str) -> tuple[nn.Linear, nn.Linear]:
    """The two projections of a new adapter, each with its fraction `sparsity` of weights pruned.

    `magnitude` prunes the smallest of the drawn weights of W_down; W_up starts at zero, where no magnitude tells
    anything, so its mask is drawn at random. `random` draws both, from torch's global generator. `snip` keeps all
    weights: `prune_adapter` prunes when it has seen data, or a saved adapter's masks are loaded. A sparsity of 0
    returns the projections as they are, and draws nothing.
    """
    if not sparsity:
        return down, up
    sparse_down, sparse_up = SparseLinear(down), SparseLinear(up)
    if pruning != "snip":
        scores = down.weight.detach().abs() if pruning == "magnitude" else random_scores(down.weight)
        sparse_down.prune(kept(scores, sparsity))
        sparse_up.prune(kept(random_scores(up.weight), sparsity))
    return sparse_down, sparse_up


def random_scores(weight: Tensor) -> Tensor:
    """Independent uniform scores of the weight's shape."""
    return torch.rand(weight.shape, device=weight.device)


def check_sparsity(sparsity: Any) -> None:
    """Raise ValueError unless `sparsity` is a number in [0, 1)."""
    if not is_number(sparsity) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity!r} is not a fraction in [0, 1): 0.8 prunes 80% of the weights, 0 none.")
