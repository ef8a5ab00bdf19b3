"""What users do to adapters between steps: write to them past every counter, and put hooks on their parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from ist import SparseTuner
from ist.step.fused import FusedLora
from ist.step.fused import frozen as fused_frozen
from tests.helpers.tiny import layer_of, tiny_batches, tiny_lora, trainable

PARTS = {"lora_A": "default", "lora_B": "default", "lora_dropout": "default"}


def merge_and_reset(model: Any) -> None:
    """ReLoRA: adapters go into the base and start again."""
    for module in lora_modules(model):
        module.base_layer.weight.data += module.get_delta_weight("default").data
        module.lora_B["default"].weight.data.zero_()


def limit_norms(model: Any) -> None:
    for module in lora_modules(model):
        module.lora_A["default"].weight.data *= 0.25


def drop_small(model: Any) -> None:
    for module in lora_modules(model):
        weight = module.lora_B["default"].weight
        weight.data = torch.where(weight.abs() < weight.abs().median(), 0, weight.data)


def swap_twice(model: Any) -> None:
    """New tensors in the places of old ones, as a moving average is tried and taken back."""
    for module in lora_modules(model):
        weight = module.lora_B["default"].weight
        for factor in (2.0, 0.1):
            weight.data = weight.data * factor


def lora_modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_B")]


def logits_of(model: Any, autocast: bool) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(**tiny_batches(1)[0]).logits.float()


def deviation(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("write", [merge_and_reset, limit_norms, drop_small, swap_twice])
@pytest.mark.parametrize("kind", ["autocast", "bf16", "float32"])
def test_frozen_layers_compute_with_what_was_written_between_steps(write: Callable[[Any], None], kind: str) -> None:
    """No importance update comes between: the layers are fixed."""
    model = tiny_lora().train()
    if kind == "bf16":
        model.to(torch.bfloat16)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    with SparseTuner(model, selector="fixed:0") as tuner:
        with tuner.step(optimizer):
            before = logits_of(model, kind == "autocast")
            optimizer.step()
        write(model)
        with tuner.step(optimizer):
            found = logits_of(model, kind == "autocast")
            optimizer.step()
    with SparseTuner(model, selector="fixed:0", fused=False) as tuner, tuner.step(optimizer):
        expected = logits_of(model, kind == "autocast")
    assert deviation(found, expected) < (1e-6 if kind == "float32" else 0.02)
    assert write is merge_and_reset or deviation(before, expected) > 0.04


def test_frozen_matrices_are_prepared_once_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not again for each micro-batch."""
    model = tiny_lora().train()
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    prepared = 0
    prepare = fused_frozen.frozen_pair

    def count(*arguments: Any) -> Any:
        nonlocal prepared
        prepared += 1
        return prepare(*arguments)

    monkeypatch.setattr(fused_frozen, "frozen_pair", count)
    with SparseTuner(model, selector="fixed:0,1") as tuner:
        for step in range(1, 4):
            with tuner.step(optimizer):
                for batch in tiny_batches(3):
                    model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            assert prepared == step * len(lora_modules(model)) // 2


Hook = Callable[[nn.Module, Callable[..., None]], Any]
HOOKS: dict[str, Hook] = {
    "forward hook": lambda module, called: module.register_forward_hook(called),
    "pre-hook": lambda module, called: module.register_forward_pre_hook(called),
    "full backward hook": lambda module, called: module.register_full_backward_hook(called),
    "full backward pre-hook": lambda module, called: module.register_full_backward_pre_hook(called),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("layer", [1, 2], ids=["active", "frozen"])
@pytest.mark.parametrize("later", [False, True])
def test_hooks_on_an_adapters_own_modules_are_called(hook: str, name: str, layer: int, later: bool) -> None:
    """Hooks that are put on after the first step count from the next one."""
    model = tiny_lora(lora_dropout=0.1).train()
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    part = getattr(model.get_base_model().model.layers[layer].mlp.up_proj, name)["default"]
    calls: list[nn.Module] = []

    def watch() -> Any:
        return HOOKS[hook](part, lambda module, *_: calls.append(module))

    handle = None if later else watch()
    with SparseTuner(model, selector="fixed:1") as tuner:
        for step in range(3):
            if step == 1:
                handle = handle or watch()
            calls.clear()
            with tuner.step(optimizer):
                model(**tiny_batches(1)[0]).loss.backward()
                held = {layer_of(n) for n, p in model.named_parameters() if p.grad is not None}
                optimizer.step()
                optimizer.zero_grad()
            assert held == {1}
            hooked = step > 0 or not later
            assert calls == [part] * hooked
            assert tuner.num_fused == len(lora_modules(model)) - hooked
            assert tuner.not_fused == ({"hooks on the adapter's own modules": 1} if hooked else {})
        if later and handle is not None:
            handle.remove()
            assert tuner.num_fused == len(lora_modules(model))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_hook_that_changes_an_output_changes_what_the_model_computes(frozen: bool) -> None:
    model = tiny_lora().train()
    batch = tiny_batches(1)[0]
    with SparseTuner(model, selector="fixed:0" if frozen else "all") as tuner:
        tuner.begin_step()
        before = model(**batch).loss
        for module in lora_modules(model.get_base_model().model.layers[2]):
            module.lora_B["default"].register_forward_hook(lambda _, args, output: output * 0)
        found = model(**batch).loss
    assert not torch.equal(found, before)
    torch.testing.assert_close(found, model(**batch).loss, rtol=1e-5, atol=0)


class Rectified(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def add_activation(module: Any) -> None:
    module.lora_A["default"].__class__ = Rectified


def prune_by_torch(module: Any) -> None:
    prune.l1_unstructured(module.lora_B["default"], "weight", 0.5)


def parametrize(module: Any) -> None:
    parametrizations.orthogonal(module.lora_B["default"])


def replace_forward(module: Any) -> None:
    part = module.lora_A["default"]
    part.forward = lambda x: nn.functional.linear(x, part.weight) / 2


@pytest.mark.parametrize("change", [prune_by_torch, parametrize, replace_forward, add_activation])
@pytest.mark.parametrize("frozen", [False, True])
def test_parts_that_are_changed_later_compute_as_they_are_then(change: Callable[[Any], None], frozen: bool) -> None:
    """The siblings of hooks: whatever makes calling a part another thing than reading its weight."""
    torch.manual_seed(0)
    module = lora_modules(tiny_lora())[0]
    x = torch.randn(2, 3, 32)
    fused = FusedLora(module, torch.no_grad())
    fused.switch.frozen = frozen
    before = module(x)
    change(module)
    found = module(x)
    fused.remove()
    assert fused.reason_against() is not None
    assert not torch.equal(found, before)
    torch.testing.assert_close(found, module(x))
