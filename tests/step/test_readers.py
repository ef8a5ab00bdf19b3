"""Blocks whose forwards other tools have replaced, and which read the adapters' weights: frozen layers stay frozen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from ist import SparseTuner
from ist.adapters.view import view_model
from ist.step.readers import adapter_readers
from tests.helpers.tiny import checkpoint_activations, layer_of, tiny_batches, tiny_lora, traces, trainable

ACTIVE = (1, 2)


def read(x: Tensor, part: Any) -> Tensor:
    a, b = part.lora_A["default"].weight, part.lora_B["default"].weight
    return part.base_layer(x) + x @ a.T @ b.T * part.scaling["default"]


def reading_mlp(module: Any, x: Tensor) -> Tensor:
    """An MLP as Unsloth's and Axolotl's kernels compute it: no adapter is called."""
    return read(module.act_fn(module.gate_proj(x)) * read(x, module.up_proj), module.down_proj)


def asking_mlp(module: Any, x: Tensor) -> Tensor:
    """One that asks an attribute for a part, as Unsloth's attention asks `apply_qkv`."""
    return read(module.act_fn(module.gate_proj(x)) * module.apply_up(x), module.down_proj)


def by_method(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in model.get_base_model().model.layers:
        block.mlp.forward = MethodType(reading_mlp, block.mlp)


def by_partial(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in model.get_base_model().model.layers:
        block.mlp.forward = partial(reading_mlp, block.mlp)


def by_class(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", reading_mlp)


def by_attribute(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in model.get_base_model().model.layers:
        block.mlp.apply_up = partial(read, part=block.mlp.up_proj)
        block.mlp.forward = MethodType(asking_mlp, block.mlp)


WAYS = [by_method, by_partial, by_class, by_attribute]


def gradients_of(model: Any, checkpointed: bool, fused: bool) -> dict[str, Tensor]:
    """The gradients of a step in which two layers train, as a norm to clip by counts them, and what stays behind."""
    if checkpointed:
        checkpoint_activations(model.get_base_model(), use_reentrant=False)
    model.train()
    before = traces(model)
    with SparseTuner(model, selector=f"fixed:{','.join(map(str, ACTIVE))}", fused=fused) as tuner:
        tuner.begin_step()
        model(**tiny_batches(1)[0]).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer = torch.optim.AdamW(trainable(model))
        optimizer.step()
        tuner.end_step(optimizer)
    assert traces(model) == before
    return found


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("change", WAYS)
def test_a_frozen_layer_has_no_gradient(
    change: Callable[..., None], checkpointed: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gradients_of(tiny_lora(), checkpointed, fused)
    model = tiny_lora()
    change(model, monkeypatch)
    found = gradients_of(model, checkpointed, fused)
    assert {layer_of(name) for name in found} == set(ACTIVE)
    assert found.keys() == plain.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name])


@pytest.mark.parametrize("change", [*WAYS, None])
def test_only_replaced_forwards_are_watched(
    change: Callable[..., None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_lora()
    checkpoint_activations(model.get_base_model(), use_reentrant=False)
    if change:
        change(model, monkeypatch)
    layers = view_model(model, None, "adapters").layers
    assert [bool(adapter_readers(layer)) for layer in layers] == [change is not None] * len(layers)


def test_a_forward_that_holds_no_adapter_or_is_the_classes_own_costs_nothing() -> None:
    model = tiny_lora()
    for block in model.get_base_model().model.layers:
        block.mlp.forward = MethodType(LlamaMLP.forward, block.mlp)
        block.input_layernorm.forward = MethodType(type(block.input_layernorm).forward, block.input_layernorm)
        block.post_attention_layernorm.forward = partial(reading_mlp, block)
    assert not any(adapter_readers(layer) for layer in view_model(model, None, "adapters").layers)
