"""Scores of layers whose adapters were trained a little: what the loss gains by each layer's response."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from ..adapters.adalora import without_orthogonality_loss
from ..adapters.layers import Layer
from ..runtime.modes import evaluation_mode, to_device
from ..runtime.sharding import compute_device
from .loss_scale import LossScale
from .passes import without_gradients
from .probes import Batch
from .reads import Reads, watched_reads
from .repeats import repeatable_loss, with_own_batch
from .suppression import (
    SWITCH_OFF,
    LossFunction,
    UnsuppressedError,
    candidate_losses,
    check_not_read,
    check_scalar,
    scaled_adapters,
)

__all__ = ["gate_scores", "removal_scores"]

Gate = tuple[Layer, torch.Tensor, str]
"""A layer, the factor on the response of one of its adapters, and that adapter's name."""
BETA = 0.25
"""`β` of eq. 8, where a gate's other end is."""
OF_REMOVAL = f"{SWITCH_OFF}, or measure criterion='gradient' before there are adapters"
OF_GATES = f"{SWITCH_OFF}, or take criterion='removal', or criterion='gradient' before there are adapters"
"""What helps where adapters cannot be measured by these criteria."""


def removal_scores(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch], loss_function: LossFunction
) -> list[float]:
    """How much the mean loss grows when the response of one layer is taken away, for each layer, in nats.

    `num_layers + 1` forwards a batch, without gradient.

    Raises:
        UnsuppressedError: the forward of a block reads the adapters' weights past their suppression.
    """
    device = compute_device(model)
    everyone = [layer.index for layer in layers]
    candidates = [everyone, *([other for other in everyone if other != one] for one in everyone)]
    try:
        losses = sum(
            candidate_losses(model, layers, candidates, to_device(batch, device), 0.0, with_own_batch(loss_function))
            for batch in batches
        )
    except UnsuppressedError as error:
        raise UnsuppressedError(error.found, OF_REMOVAL) from error
    losses = torch.as_tensor(losses) / len(batches)
    return (losses[1:] - losses[0]).tolist()


def gate_scores(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch], loss_function: LossFunction
) -> list[float]:
    """What each layer's response saves between a factor of β and 1, `-(1 − β)·∂L/∂g_i`, in nats.

    The factors `g_i` of all layers are `(1 + β)/2`, the midpoint: at 1, training has driven the gradient to zero. One
    forward and one backward a batch, for all layers at once. Each adapter has a factor of its own, and the gradients of
    a layer's are added up. NaN where a loss is not finite.

    Raises:
        UnsuppressedError: the forward of a block reads an adapter's weights, and no gradient comes to its factor.
        ValueError: a gradient overflows float16.
    """
    device = compute_device(model)
    middle, total = (1 + BETA) / 2, 0.0
    gates = [
        (layer, torch.full((), middle, device=device, requires_grad=True), name)
        for layer in layers
        for name in layer.adapters
    ]
    scale = LossScale(model)
    try:
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(model))
            stack.enter_context(without_orthogonality_loss(model))
            stack.enter_context(without_gradients(model))
            stack.enter_context(torch.enable_grad())
            reads = stack.enter_context(watched_reads((layer, layer.adapters[name]) for layer, _, name in gates))
            stack.enter_context(scale.seeing(layer.adapters[name] for layer, _, name in gates))
            for number, given in enumerate(batches):
                compute = repeatable_loss(model, given, number, loss_function)
                loss = gated_loss(gates, compute)
                total += check_scalar(loss).item()
                if not loss.requires_grad:
                    check_gates(gates, reads)
                while not gate_backward(loss, number, gates, scale):
                    loss = gated_loss(gates, compute)
        check_gates(gates, reads)
    except UnsuppressedError as error:
        raise UnsuppressedError(error.found, OF_GATES) from error
    if not math.isfinite(total):  # The gradient of a mean over no labels is 0, and its loss NaN.
        return [math.nan] * len(layers)
    sums = {layer.index: 0.0 for layer in layers}
    for layer, gate, _ in gates:
        sums[layer.index] += 0.0 if gate.grad is None else gate.grad.item()
    return [-(1 - BETA) * sums[layer.index] / len(batches) for layer in layers]


def gated_loss(gates: Sequence[Gate], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The loss with each response multiplied by its gate."""
    with scaled_adapters(gates):
        return compute()


def gate_backward(loss: torch.Tensor, number: int, gates: Sequence[Gate], scale: LossScale) -> bool:
    """Add a batch's gradients to those of the gates; False where the batch must be computed again, see `LossScale`."""
    if not scale.used:
        loss.backward()
        return True
    before = [gate.grad for _, gate, _ in gates]
    for _, gate, _ in gates:
        gate.grad = None
    own = scale.backward(loss, number, lambda: all(g.grad is None or math.isfinite(g.grad.item()) for _, g, _ in gates))
    for (_, gate, _), earlier in zip(gates, before, strict=True):
        if not own or gate.grad is None:
            gate.grad = earlier
        else:
            gate.grad = gate.grad / scale.value + (0.0 if earlier is None else earlier)
    return own


def check_gates(gates: Sequence[Gate], reads: Reads) -> None:
    """Raise UnsuppressedError where a gate has no gradient since a kernel takes the factor for a constant."""
    check_not_read([layer.adapters[name] for layer, gate, name in gates if gate.grad is None], reads)
