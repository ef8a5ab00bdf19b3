"""The optimizer's moments of frozen layers: kept, forgotten or away. What needs a GPU is in tests/gpu."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ist import SparseTuner
from ist.adapters.view import ModelView
from ist.step.optimizer_state import OptimizerState
from tests.helpers.tiny import layer_of, snapshot, tiny_batches, tiny_lora, trainable

STEPS = 12


def train(mode: str, **options: Any) -> tuple[dict[str, Tensor], Any, Any]:
    """The adapter after some steps, its optimizer and the model."""
    model = tiny_lora()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    with SparseTuner(model, probe_batches=tiny_batches(2), optimizer_state=mode, num_active_layers=2, **options) as t:
        for batch in tiny_batches(STEPS):
            step(model, optimizer, t, batch)
    return snapshot(model), optimizer, model


def step(model: Any, optimizer: Any, tuner: SparseTuner, batch: Any) -> tuple[int, ...]:
    active = tuner.begin_step()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    tuner.end_step(optimizer)
    return active


def layers_with_moments(model: Any, optimizer: Any) -> set[int | None]:
    return {layer_of(name) for name, parameter in model.named_parameters() if optimizer.state.get(parameter)}


def test_reset_forgets_a_layer_when_it_goes_frozen() -> None:
    model = tiny_lora()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    with SparseTuner(model, probe_batches=tiny_batches(2), optimizer_state="reset", num_active_layers=2) as tuner:
        before: tuple[int, ...] = ()
        stayed = 0
        for batch in tiny_batches(STEPS):
            active = step(model, optimizer, tuner, batch)
            assert layers_with_moments(model, optimizer) == set(active)
            ages = {
                layer_of(name): int(optimizer.state[parameter]["step"])
                for name, parameter in model.named_parameters()
                if optimizer.state.get(parameter)
            }
            assert all((age > 1) == (layer in before) for layer, age in ages.items())
            stayed += any(layer in before for layer in active)
            before = active
        assert stayed  # or nothing was seen of moments that stay


def test_keep_keeps_what_reset_forgets() -> None:
    kept, optimizer, model = train("keep")
    reset, _, _ = train("reset")
    assert layers_with_moments(model, optimizer) == {0, 1, 2, 3}
    assert any(not torch.equal(kept[name], reset[name]) for name in kept)


def test_offload_on_the_cpu_is_keep() -> None:
    kept, _, _ = train("keep")
    offloaded, optimizer, _ = train("offload")
    assert all(torch.equal(kept[name], offloaded[name]) for name in kept)
    assert not optimizer._optimizer_step_pre_hooks  # close() left the optimizer alone


def test_reset_goes_with_a_checkpoint_of_the_optimizer() -> None:
    """A state without some layers' moments is saved and loaded as any other."""
    whole, _, _ = train("reset")
    model = tiny_lora()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    options: dict[str, Any] = {"optimizer_state": "reset", "num_active_layers": 2, "probe_batches": tiny_batches(2)}
    batches = tiny_batches(STEPS)
    with SparseTuner(model, **options) as tuner:
        for batch in batches[:5]:
            step(model, optimizer, tuner, batch)
        saved = {"optimizer": optimizer.state_dict(), "tuner": tuner.state_dict(), "weights": model.state_dict()}
    again = tiny_lora()
    again.load_state_dict(saved["weights"])
    optimizer = torch.optim.AdamW(trainable(again), lr=0.01)
    optimizer.load_state_dict(saved["optimizer"])
    with SparseTuner(again, **options) as tuner:
        tuner.load_state_dict(saved["tuner"])
        tuner.attach_optimizer(optimizer)
        for batch in batches[5:]:
            step(again, optimizer, tuner, batch)
    resumed = snapshot(again)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_sharded_weights_are_not_offloaded() -> None:
    view = ModelView(tiny_lora(), (), sharded=True)
    with pytest.raises(ValueError, match=r"optimizer_state='offload' does not go with .* leave it 'keep'"):
        OptimizerState(None, view, "offload")
    OptimizerState(None, view, "keep")
