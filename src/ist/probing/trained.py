"""Scores of layers whose adapters were trained a little: what the loss gains by each layer's response."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from ..adapters.adalora import without_orthogonality_loss
from ..adapters.layers import Layer
from ..runtime.modes import evaluation_mode, to_device
from ..runtime.sharding import compute_device
from .passes import without_gradients
from .probes import Batch
from .suppression import LossFunction, candidate_losses, check_not_read, check_scalar, scaled_layers

__all__ = ["gate_scores", "removal_scores"]

BETA = 0.25
"""`β` of eq. 8, where a gate's other end is."""


def removal_scores(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch], loss_function: LossFunction
) -> list[float]:
    """How much the mean loss grows when the response of one layer is taken away, for each layer, in nats.

    `num_layers + 1` forwards a batch, without gradient.
    """
    device = compute_device(model)
    everyone = [layer.index for layer in layers]
    candidates = [everyone, *([other for other in everyone if other != one] for one in everyone)]
    losses = sum(
        candidate_losses(model, layers, candidates, to_device(batch, device), 0.0, loss_function) for batch in batches
    )
    losses = torch.as_tensor(losses) / len(batches)
    return (losses[1:] - losses[0]).tolist()


def gate_scores(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch], loss_function: LossFunction
) -> list[float]:
    """What each layer's response saves between a factor of β and 1, `-(1 − β)·∂L/∂g_i`, in nats.

    The factors `g_i` of all layers are `(1 + β)/2`, the midpoint: at 1, training has driven the gradient to zero. One
    forward and one backward a batch, for all layers at once.

    Raises:
        UnsuppressedError: the forward of a block reads the adapters' weights, and no gradient comes to their factor.
    """
    device = compute_device(model)
    middle = (1 + BETA) / 2
    gates = [torch.full((), middle, device=device, requires_grad=True) for _ in layers]
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(without_orthogonality_loss(model))
        stack.enter_context(without_gradients(model))
        stack.enter_context(torch.enable_grad())
        for batch in batches:
            with scaled_layers(list(zip(layers, gates, strict=True))):
                loss = loss_function(model, to_device(batch, device))
            check_scalar(loss)
            if not loss.requires_grad:
                check_gates(layers, gates)
            loss.backward()
    check_gates(layers, gates)
    return [-(1 - BETA) * (0.0 if gate.grad is None else gate.grad.item()) / len(batches) for gate in gates]


def check_gates(layers: Sequence[Layer], gates: Sequence[torch.Tensor]) -> None:
    """Raise UnsuppressedError where a gate has no gradient since a kernel takes the factor for a constant."""
    for layer, gate in zip(layers, gates, strict=True):
        if gate.grad is None:
            for adapter in layer.adapters.values():
                check_not_read(layer, adapter)
