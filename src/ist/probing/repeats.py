"""A loss that is computed several times of one batch: each time of the whole batch, and with the same draws."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.modes import to_device
from ..runtime.randomness import keyed_seed, private_randomness
from ..runtime.sharding import compute_device
from .suppression import LossFunction, model_loss

__all__ = ["own", "repeatable_loss", "with_own_batch"]


def repeatable_loss(
    model: nn.Module, given: Mapping[str, Any], number: int, loss_function: LossFunction
) -> Callable[[], Tensor]:
    """Computes the loss of a batch, the same each time.

    Args:
        model: the batch is moved to where it computes.
        given: the batch, which stays as it is.
        number: of the batch: each draws numbers of its own, from torch's present seed.
        loss_function: `(model, batch) -> loss`; it may draw at random, and change its batch.
    """
    device = compute_device(model)
    batch, seed = to_device(given, device), keyed_seed(torch.initial_seed(), "batch", number)
    loss_of = with_own_batch(loss_function)

    def loss() -> Tensor:
        with private_randomness(seed, device):
            return loss_of(model, batch)

    return loss


def with_own_batch(loss_function: LossFunction) -> LossFunction:
    """The loss of a copy of the batch: a loss may take labels out of it or mask them, and the next candidate, or the
    training itself, needs them. The model's own does neither.
    """
    if loss_function is model_loss:
        return loss_function

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return loss_function(model, own(batch))

    return loss


def own(value: Any) -> Any:
    """A copy of a batch: of its containers, however deep, and of the tensors in them; other objects are shared."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, MutableMapping):
        copied = copy.copy(value)
        for name in list(copied):
            copied[name] = own(copied[name])
        return copied
    if type(value) in (list, tuple):
        return type(value)(map(own, value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(own, value))  # type: ignore[call-arg]
    return copy.copy(value) if isinstance(value, Mapping) else value
