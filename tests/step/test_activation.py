"""Frozen layers hold still: to the bit, under every optimizer, with checkpointing, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from ist.adapters.view import view_model
from ist.step.activation import LayerActivation
from tests.helpers.tiny import (
    checkpoint_activations,
    layer_of,
    moved_layers,
    snapshot,
    tiny_batches,
    tiny_lora,
    traces,
    trainable,
)


def bitsandbytes_adamw(parameters: list[nn.Parameter]) -> Any:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no 8-bit optimizer to test")
    return bnb.optim.AdamW8bit(parameters, lr=0.01, weight_decay=0.5)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    "AdamW, not foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5, foreach=False),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5, fused=True),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adafactor": lambda p: Adafactor(p, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "AdamW, 8-bit": bitsandbytes_adamw,
}


@pytest.mark.parametrize("set_to_none", [True, False], ids=["grads dropped", "grads zeroed"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_layers_do_not_move_by_one_bit(name: str, set_to_none: bool) -> None:
    """Also where zeroed gradients from an earlier step would let weight decay and momentum move them."""
    model = tiny_lora()
    optimizer = OPTIMIZERS[name](trainable(model))
    activation = LayerActivation(view_model(model, None, "adapters"))
    for step, batch in enumerate(tiny_batches(6)):
        active = {step % 4, (step + 1) % 4}
        activation.begin(active)
        before = snapshot(model)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        assert moved_layers(before, snapshot(model)) == active


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointing", "reentrant checkpointing"])
@pytest.mark.parametrize("input_grads", [False, True])
def test_active_gradients_are_those_of_full_training(reentrant: bool | None, input_grads: bool) -> None:
    """With activation checkpointing too, whose recomputation in the backward must freeze what the forward froze."""
    model = tiny_lora(lora_dropout=0.1)
    batch = tiny_batches(1)[0]
    if input_grads:
        model.enable_input_require_grads()
    torch.manual_seed(0)
    model(**batch).loss.backward()
    full = gradients(model)
    model.zero_grad()
    if reentrant is not None:
        checkpoint_activations(model.get_base_model(), use_reentrant=reentrant)
        if reentrant:
            model.enable_input_require_grads()
    activation = LayerActivation(view_model(model, None, "adapters"), frozen_dropout=True)
    activation.begin([1, 3])
    torch.manual_seed(0)
    model(**batch, use_cache=False).loss.backward()
    sparse = gradients(model)
    assert {layer_of(name) for name in sparse} == {1, 3}
    assert len(sparse) == len(full) // 2
    for name, gradient in sparse.items():
        torch.testing.assert_close(gradient, full[name], rtol=1e-5, atol=1e-7)


def test_saved_activations_shrink() -> None:
    """What autograd keeps for the backward is less with one layer of four active."""

    def saved_bytes(active: list[int] | None) -> int:
        model = tiny_lora()
        activation = LayerActivation(view_model(model, None, "adapters"))
        if active is not None:
            activation.begin(active)
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**tiny_batches(1)[0]).loss
        assert loss.requires_grad
        return sum(kept.values())

    # Layer 3 is the last: below it nothing is kept. Layer 0 is the first: the backward walks through all the others.
    assert saved_bytes([3]) < 0.6 * saved_bytes([0])
    assert saved_bytes([0]) < 0.95 * saved_bytes(None)


def test_between_forwards_nothing_is_frozen() -> None:
    model = tiny_lora()
    before = traces(model)["requires_grad"]
    activation = LayerActivation(view_model(model, None, "adapters"))
    activation.begin([2])
    assert activation.active == (2,)
    assert traces(model)["requires_grad"] == before
    loss = model(**tiny_batches(1)[0]).loss
    assert traces(model)["requires_grad"] == before
    loss.backward()
    assert traces(model)["requires_grad"] == before


def test_a_forward_that_raises_leaves_nothing_frozen() -> None:
    model = tiny_lora()
    before = traces(model)
    activation = LayerActivation(view_model(model, None, "adapters"))
    activation.begin([0])
    adapter = model.get_base_model().model.layers[2].mlp.up_proj
    with pytest.raises(RuntimeError, match="shape"):
        adapter(torch.zeros(2, 5))
    assert traces(model)["requires_grad"] == before["requires_grad"]
    activation.close()
    assert traces(model) == before


def test_contexts_that_unfreeze_do_not_unfreeze_frozen_layers() -> None:
    """`disable_adapter()` and `set_adapter()` switch all gradients on again, in the middle of a step."""
    model = tiny_lora()
    activation = LayerActivation(view_model(model, None, "adapters"))
    activation.begin([1])
    batch = tiny_batches(1)[0]
    with model.disable_adapter(), torch.no_grad():
        model(**batch)
    model.set_adapter("default")
    model(**batch).loss.backward()
    assert {layer_of(name) for name in gradients(model)} == {1}


def test_a_disabled_adapter_stays_as_peft_disabled_it() -> None:
    model = tiny_lora()
    activation = LayerActivation(view_model(model, None, "adapters"))
    activation.begin([1])
    with model.disable_adapter():
        before = traces(model)
        model(**tiny_batches(1)[0])
        assert traces(model) == before


def test_activate_all_and_close() -> None:
    model = tiny_lora()
    before = traces(model)
    activation = LayerActivation(view_model(model, None, "adapters"))
    activation.begin([0])
    activation.end()
    assert activation.active is None
    model(**tiny_batches(1)[0]).loss.backward()
    assert {layer_of(name) for name in gradients(model)} == {0, 1, 2, 3}
    activation.close()
    activation.close()
    assert traces(model) == before


def test_a_training_that_died_does_not_freeze_the_next() -> None:
    """Its hooks are still on the model: the Trainer tells no callback of an exception."""
    model = tiny_lora()
    died = LayerActivation(view_model(model, None, "adapters"))
    died.begin([0])
    again = LayerActivation(view_model(model, None, "adapters"))
    again.begin([1, 2, 3])
    model(**tiny_batches(1)[0]).loss.backward()
    assert {layer_of(name) for name in gradients(model)} == {1, 2, 3}
    died.close()
    again.close()
    assert all(hooks == 0 for name, hooks in traces(model)["hooks"].items() if name.endswith("proj"))


def test_gradients_past_the_forward_are_dropped() -> None:
    """A loss on the weights themselves, as AdaLoRA's, reaches frozen layers."""
    model = tiny_lora()
    activation = LayerActivation(view_model(model, None, "adapters"))
    activation.begin([2])
    weights = trainable(model)
    (model(**tiny_batches(1)[0]).loss + sum(weight.square().sum() for weight in weights)).backward()
    assert {layer_of(name) for name in gradients(model)} == {0, 1, 2, 3}
    activation.before_update()
    assert {layer_of(name) for name in gradients(model)} == {2}
