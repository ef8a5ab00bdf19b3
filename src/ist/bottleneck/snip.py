"""Prune an adapter by what its weights mean for the loss: SNIP (Lee et al., 2019), as SparseAdapter uses it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..probing.loss_scale import LossScale
from ..probing.repeats import repeatable_loss
from ..probing.suppression import LossFunction, model_loss
from ..runtime.modes import evaluation_mode
from .config import BottleneckConfig
from .layer import BottleneckLayer
from .sparse import SparseLinear, check_sparsity, kept

__all__ = ["prune_adapter"]


def prune_adapter(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    sparsity: float,
    adapter_name: str = "default",
    loss_function: LossFunction | None = None,
) -> None:
    """Prune the weights of a new bottleneck adapter whose SNIP score `|w · ∂L/∂w|` is smallest.

    `L` is the sum of the batches' losses, in evaluation mode. The scores of all the adapter's weights are ranked
    together, so layers keep different shares, and a layer may keep none. A new adapter's `W_up` is zero, and so would
    all scores be: they are taken at a temporary random `W_up`, drawn as `nn.Linear` draws its weights from torch's
    global generator, and zeros are put back. The pruned adapter leaves the model's outputs unchanged to the bit.

    Call it before the optimizer is made or after, but before training. Where several processes train together, each
    needs the same batches and the same seed.

    Args:
        model: a PEFT model with that adapter active.
        batches: what the model takes; the more, the better the scores. Ten of the training's size are a start.
        sparsity: the fraction of the adapter's weights to prune, in (0, 1).
        adapter_name: name of the adapter.
        loss_function: `(model, batch) -> loss`, a scalar; `model(**batch).loss` if None.

    Raises:
        ValueError: the adapter is missing, inactive, trained or pruned already, an argument does not fit, or a gradient
            overflows float16. The model is then as it was.
    """
    check_sparsity(sparsity)
    if sparsity == 0:
        raise ValueError("sparsity=0 prunes nothing: give a fraction in (0, 1), such as 0.8, or leave the call out.")
    if isinstance(batches, Mapping):
        raise ValueError("batches is one batch: give a list of batches, as in [batch].")
    layers = new_adapter_layers(model, adapter_name)
    slots = [slot for layer in layers for slot in (layer.bottleneck_down, layer.bottleneck_up)]
    weights = [projection(slot, adapter_name).weight for slot in slots]
    with temporary_up_projections(layers, adapter_name), evaluation_mode(model), trainable(weights):
        scale = LossScale(model)
        with scale.seeing(layers):
            gradients = loss_gradients(model, batches, weights, loss_function or model_loss, scale)
        scores = [(weight.detach() * gradient).abs() for weight, gradient in zip(weights, gradients, strict=True)]
    if not all(score.isfinite().all() for score in scores):
        raise ValueError("A SNIP score is not finite, so nothing was pruned: check the batches for a loss of nan.")
    device = scores[0].device
    masks = kept(torch.cat([score.flatten().float().to(device) for score in scores]), sparsity)
    for slot, mask, score in zip(slots, masks.split([score.numel() for score in scores]), scores, strict=True):
        linear = projection(slot, adapter_name)
        sparse = linear if isinstance(linear, SparseLinear) else SparseLinear(linear).train(linear.training)
        sparse.prune(mask.view_as(score))
        slot[adapter_name] = sparse
    configs = cast("dict[str, BottleneckConfig]", model.peft_config)
    configs[adapter_name] = replaced = copy.copy(configs[adapter_name])  # Several adapters may share one object.
    replaced.sparsity, replaced.pruning = float(sparsity), "snip"


def new_adapter_layers(model: nn.Module, adapter_name: str) -> list[BottleneckLayer]:
    """The layers that carry the adapter.

    Raises:
        ValueError: there is none, or it is inactive, trained or pruned.
    """
    found = [module for module in model.modules() if isinstance(module, BottleneckLayer)]
    layers = [layer for layer in found if adapter_name in layer.scaling]
    if not layers:
        names = sorted({name for layer in found for name in layer.scaling})
        known = f"it has {', '.join(names)}" if names else "put one on with get_peft_model(model, BottleneckConfig())"
        raise ValueError(f"The model has no bottleneck adapter {adapter_name!r}: {known}.")
    for layer in layers:
        if layer.disable_adapters or adapter_name not in layer.active_adapters:
            raise ValueError(f"Adapter {adapter_name!r} is not active: call model.set_adapter({adapter_name!r}) first.")
        for slot in (layer.bottleneck_down, layer.bottleneck_up):
            linear = projection(slot, adapter_name)
            if isinstance(linear, SparseLinear) and not linear.mask.all():
                raise ValueError(f"Adapter {adapter_name!r} is pruned already: make a new one with sparsity=0.")
        if projection(layer.bottleneck_up, adapter_name).weight.any():
            raise ValueError(f"Adapter {adapter_name!r} is trained already (W_up is not zero): prune a new one.")
    return layers


def projection(slot: nn.ModuleDict, adapter_name: str) -> nn.Linear:
    """The adapter's entry in `bottleneck_down` or `bottleneck_up`."""
    return cast("nn.Linear", slot[adapter_name])


def loss_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    weights: Sequence[Tensor],
    loss_function: LossFunction,
    scale: LossScale,
) -> list[Tensor]:
    """The gradient of the batches' summed loss for each weight; `.grad` of no parameter changes."""
    total = [torch.zeros_like(weight) for weight in weights]
    num_batches = 0
    for given in batches:
        compute, gradients = repeatable_loss(model, given, num_batches, loss_function), None
        while gradients is None:
            with torch.enable_grad():
                loss = compute()
                if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                    raise ValueError("loss_function must return a tensor of one number with a gradient, the mean loss.")
                gradients = scale.gradients(loss.reshape(()), num_batches, weights)
        total = [sum_ + gradient for sum_, gradient in zip(total, gradients, strict=True)]
        num_batches += 1
    if num_batches == 0:
        raise ValueError("batches is empty, so there are no scores to prune by: give at least one batch.")
    return total


@contextmanager
def temporary_up_projections(layers: list[BottleneckLayer], adapter_name: str) -> Iterator[None]:
    """Within the context W_up is random; afterwards it is as it was, to the bit."""
    weights = [projection(layer.bottleneck_up, adapter_name).weight for layer in layers]
    before = [weight.detach().clone() for weight in weights]
    try:
        for weight in weights:
            nn.init.kaiming_uniform_(weight, a=5**0.5)
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


@contextmanager
def trainable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within the context the parameters require a gradient."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
