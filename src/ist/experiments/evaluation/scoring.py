"""Log-likelihoods of tokens, in batches, without the logits of what is not asked for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...runtime.wrappers import base_model
from ..data.encoding import pad

__all__ = ["Continuations", "by_length", "score"]

CHUNK = 256
"""Positions whose logits are in float32 at once."""


@dataclass(frozen=True)
class Continuations:
    """Continuations of one prompt that are alike up to their last token, and so need one forward pass."""

    ids: tuple[int, ...]
    """The prompt and the tokens that the continuations share."""
    start: int
    """Number of tokens of the prompt, at least 1."""
    lasts: tuple[int, ...]
    """The last token of each continuation."""


@torch.no_grad()
def score(model: Any, batch: Sequence[Continuations]) -> list[list[float]]:
    """The log-likelihood in nats of every continuation, given its prompt: the sum over its tokens.

    Args:
        model: a causal language model, in evaluation mode.
        batch: computed in one forward pass.

    Raises:
        ValueError: the model computes NaN.
    """
    ids, mask = pad([item.ids for item in batch], "right")
    first = min(item.start for item in batch) - 1  # the position that predicts the first token of a continuation
    options: dict[str, Any] = {"use_cache": False}
    if _takes_logits_to_keep(model):
        options["logits_to_keep"] = ids.shape[1] - first
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **options).logits
    logits = logits[:, logits.shape[1] - (ids.shape[1] - first) :]
    values = [_score_row(logits[index], item, first) for index, item in enumerate(batch)]
    if any(math.isnan(value) for row in values for value in row):
        dtype = str(logits.dtype).removeprefix("torch.")
        raise ValueError(
            f"The model computes NaN from these texts in {dtype}, so that they have no loss and no likelihoods: give "
            "--dtype float32, or see whether its weights and its config.json are undamaged."
        )
    return values


def _score_row(logits: Tensor, item: Continuations, first: int) -> list[float]:
    """One row's continuations; row 0 of the logits is position `first`."""
    rows = logits[item.start - 1 - first : len(item.ids) - first]
    shared = torch.tensor(item.ids[item.start :], dtype=torch.long, device=rows.device)
    total = 0.0
    for begin in range(0, len(shared), CHUNK):
        part = rows[begin : min(begin + CHUNK, len(shared))].float()
        chosen = part.gather(1, shared[begin : begin + CHUNK, None])[:, 0]
        total += float((chosen - part.logsumexp(-1)).double().sum())
    last = rows[-1].float()
    lasts = (last[torch.tensor(item.lasts, device=last.device)] - last.logsumexp(-1)).double()
    return [total + value for value in lasts.tolist()]


def _takes_logits_to_keep(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(base_model(model).forward).parameters


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of like lengths, the longest first: what does not fit into memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
