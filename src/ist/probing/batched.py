"""The losses of all candidate sets of an update from one forward.

Measuring is many small forwards: on a fast GPU, three of them with a row or two each take three times what the host
needs to launch one. Here the probe batch is laid out once for each candidate set, one after the other, and every LoRA
module scales its response by its layer's factor for each of them. This serves causal language models whose adapters
are all fused (`ist.step.fused`), and batches small enough to be launch-bound. Everything else is measured set by set
(`ist.probing.suppression`), and `BatchedLosses` compares the two before it trusts this way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.layers import Layer
from ..adapters.view import ModelView
from ..runtime.modes import evaluation_mode
from ..runtime.wrappers import base_model
from ..step.compiled import as_written
from ..step.fused import FusedLora, JoinError, RowFactors
from .suppression import factors_of

__all__ = ["BatchedLosses", "batched_losses"]

MAX_TOKENS = 4096
"""Tokens of all candidates together up to which one forward is tried; beyond, a GPU is busy with one candidate."""
TOLERANCE = 0.02
"""How far a loss from one forward may be from the same one measured alone, relative to it: bfloat16 is off by less."""
SHARE_OF_SPREAD = 0.1
"""How far it may be, relative to how far the candidates' losses lie apart: differences are what is learned from."""
MAX_COMPARED = 20
"""Probe batches after which what has not been decided stays set by set."""
MODEL_INPUTS = {"input_ids", "attention_mask", "labels"}
"""What can be laid out row by row. Positions are none of it: rows that hold several sequences are told by them."""


class BatchedLosses:
    """Measures candidate sets in one forward where that gives what `one_by_one` gives.

    Args:
        view: the model in training, not sharded.
        beta: factor on the response of the layers outside a candidate set, in [0, 1].
        one_by_one: `(candidates, batch) -> losses`, float64 `[N_c]`: what to do otherwise, and to compare with first.
    """

    def __init__(
        self,
        view: ModelView,
        beta: float,
        one_by_one: Callable[[Sequence[Collection[int]], Mapping[str, Any]], Tensor],
    ) -> None:
        self._view, self._beta = view, beta
        self._one_by_one = one_by_one
        self.trusted: bool | None = None
        """Whether one forward is right for this model; None while that has not been decided."""

    def __call__(self, candidates: Sequence[Collection[int]], batch: Mapping[str, Any], index: int = 0) -> Tensor:
        """Losses in nats, float64 of shape `[N_c]` on the CPU; `index` is that of the probe batch in the run."""
        if self.trusted is None and index >= MAX_COMPARED:
            self.trusted = False
        if self.trusted is False or not fits(batch, len(candidates)):
            return self._one_by_one(candidates, batch)
        rows, tokens = batch["input_ids"].shape
        if self.trusted is None and rows * len(candidates) == tokens:  # Tokens first would go unnoticed.
            return self._one_by_one(candidates, batch)
        with as_written(self._view):
            return self._at_once(candidates, batch)

    def _at_once(self, candidates: Sequence[Collection[int]], batch: Mapping[str, Any]) -> Tensor:
        """From one forward if that can be, compared with one for each set until that is decided."""
        try:
            losses = batched_losses(self._view.model, self._view.layers, candidates, batch, self._beta)
        except Exception as error:  # What is wrong with the batch or the model comes up again, set by set.
            if self.trusted and not isinstance(error, (JoinError, torch.OutOfMemoryError)):
                raise
            self.trusted = False
            return self._one_by_one(candidates, batch)
        if self.trusted is None:
            alone = self._one_by_one(candidates, batch)
            if not alone.isfinite().all():  # Nothing can be said of such a batch, but of the next one.
                return alone
            self.trusted = is_same(losses, alone)
            return losses if self.trusted else alone
        return losses


def is_same(losses: Tensor, alone: Tensor) -> bool | None:
    """Whether losses are those that were measured alone, `[N_c]` each; None where the candidates lie too close together
    to tell, as before the adapters respond.
    """
    error = (losses - alone).abs()
    if bool((error > TOLERANCE * alone.abs()).any()):
        return False
    spread = alone.max() - alone.min()
    return True if spread > 0 and bool((error <= SHARE_OF_SPREAD * spread).all()) else None


def fits(batch: Mapping[str, Any], num_candidates: int) -> bool:
    """Whether a batch can be laid out several times, and is small enough for it to bring something."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or "labels" not in batch or ids.dim() != 2:
        return False
    return (
        set(batch) <= MODEL_INPUTS
        and all(isinstance(value, Tensor) and value.shape == ids.shape for value in batch.values())
        and ids.numel() * num_candidates <= MAX_TOKENS
    )


@torch.no_grad()
def batched_losses(
    model: nn.Module,
    layers: Sequence[Layer],
    candidates: Sequence[Collection[int]],
    batch: Mapping[str, Any],
    beta: float,
) -> Tensor:
    """The loss of each candidate set on one batch (eq. 8), from one forward over the batch laid out `N_c` times.

    Args:
        model: a causal language model of transformers, inside of PEFT's.
        layers: all layers that carry adapters, each of them fused and frozen.
        candidates: `N_c` sets of layers that keep their full response.
        batch: `input_ids`, `labels` and perhaps `attention_mask`, each `[rows, tokens]`.
        beta: factor on the response of the layers outside a candidate set.

    Returns:
        Losses in nats, float64 of shape `[N_c]` on the CPU.

    Raises:
        JoinError: the model or an adapter cannot be computed so.
    """
    inner = base_model(model)
    loss_function = getattr(inner, "loss_function", None)
    vocab_size = getattr(getattr(inner, "config", None), "vocab_size", None)
    if loss_function is None or vocab_size is None:
        raise JoinError("the model has no loss of its own to compute from logits")
    inputs = {name: value.repeat(len(candidates), 1) for name, value in batch.items() if name != "labels"}
    with evaluation_mode(model), factors_by_row(layers, candidates, beta, inputs["input_ids"]):
        outputs = model(**inputs)
    logits, labels = outputs.logits, batch["labels"]
    if getattr(outputs, "aux_loss", None) is not None:  # of the routers of a mixture of experts
        raise JoinError("a part of the loss comes from elsewhere than the logits")
    if not isinstance(logits, Tensor) or logits.shape[:2] != inputs["input_ids"].shape:
        raise JoinError("the logits are not of one token each")
    losses = [
        loss_function(logits=part, labels=labels, vocab_size=vocab_size) for part in logits.chunk(len(candidates))
    ]
    return torch.stack([loss.detach().double().reshape(()) for loss in losses]).cpu()


@contextmanager
def factors_by_row(
    layers: Sequence[Layer], candidates: Sequence[Collection[int]], beta: float, ids: Tensor
) -> Iterator[None]:
    """Within the context each layer's response is scaled in the rows of the candidates that suppress the layer.

    Raises:
        JoinError: an adapter is not fused.
    """
    table = torch.tensor([factors_of(layers, candidate, beta) for candidate in candidates]).T.contiguous()
    table = table.to(ids.device)[..., None, None]
    shape = (ids.shape[0], ids.shape[1])
    changed: list[nn.Module] = []
    try:
        for layer, factors in zip(layers, table, strict=True):
            for adapter in layer.adapters.values():
                FusedLora.set_factors(adapter, RowFactors(factors, shape))
                changed.append(adapter)
        yield
    finally:
        for adapter in changed:
            FusedLora.set_factors(adapter, None)
