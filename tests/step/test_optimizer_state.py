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


def two_optimizers(model: Any) -> list[torch.optim.Optimizer]:
    halves: list[list[Any]] = [[], []]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            halves["lora_B" in name].append(parameter)
    return [torch.optim.AdamW(half, lr=0.01) for half in halves]


def train_with_two(loop: str, model: Any, optimizers: list[Any], tuner: SparseTuner, batch: Any) -> tuple[int, ...]:
    """A step with both, of which the tuner is given the first."""
    if loop == "begin and end":
        active = tuner.begin_step()
        model(**batch).loss.backward()
    else:
        with tuner.step(optimizers[0]) as active:
            model(**batch).loss.backward()
            if loop == "in the block":
                for optimizer in optimizers:
                    optimizer.step()
    if loop != "in the block":
        for optimizer in optimizers:
            optimizer.step()
    model.zero_grad()
    if loop == "begin and end":
        tuner.end_step(optimizers[0])
    return active


@pytest.mark.filterwarnings("ignore:The optimizer lacks trainable parameters")
@pytest.mark.parametrize("loop", ["begin and end", "in the block", "after the block"])
def test_reset_reaches_an_optimizer_that_was_not_given(loop: str) -> None:
    """One has the down-projections and another the up-projections, and a step is one of both."""
    model = tiny_lora()
    optimizers = two_optimizers(model)
    seen = set()
    with SparseTuner(model, probe_batches=tiny_batches(2), optimizer_state="reset", num_active_layers=2) as tuner:
        for batch in tiny_batches(STEPS):
            active = train_with_two(loop, model, optimizers, tuner, batch)
            seen.add(active)
            for optimizer in optimizers:
                assert layers_with_moments(model, optimizer) == set(active)
    assert len(seen) > 1
    assert tuner.num_steps == STEPS


@pytest.mark.filterwarnings("ignore:The optimizer lacks trainable parameters")
@pytest.mark.parametrize("loop", ["begin and end", "in the block", "after the block"])
def test_reset_forgets_at_once_what_a_checkpoint_had_of_frozen_layers(loop: str) -> None:
    """The optimizer that was not given begins with moments of all layers."""
    model = tiny_lora()
    optimizers = two_optimizers(model)
    model(**tiny_batches(1)[0]).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
    with SparseTuner(model, probe_batches=tiny_batches(2), optimizer_state="reset", num_active_layers=2) as tuner:
        active = train_with_two(loop, model, optimizers, tuner, tiny_batches(1)[0])
        for optimizer in optimizers:
            assert layers_with_moments(model, optimizer) == set(active)


@pytest.mark.filterwarnings("ignore:The optimizer lacks trainable parameters")
def test_offload_reaches_an_optimizer_that_was_not_given_and_leaves_it_alone_afterwards() -> None:
    model = tiny_lora()
    optimizers = two_optimizers(model)
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    with SparseTuner(model, probe_batches=tiny_batches(2), optimizer_state="offload", num_active_layers=2) as tuner:
        for batch in tiny_batches(3):
            train_with_two("in the block", model, optimizers, tuner, batch)
            other.step()
        assert [len(optimizer._optimizer_step_pre_hooks) for optimizer in (*optimizers, other)] == [1, 1, 0]
    assert not any(optimizer._optimizer_step_pre_hooks for optimizer in optimizers)


def test_an_optimizer_that_has_stepped_is_still_looked_at_when_it_is_given() -> None:
    model = tiny_lora()
    optimizers = two_optimizers(model)
    lacks = pytest.warns(UserWarning, match="The optimizer lacks trainable parameters of 4 layers")
    with SparseTuner(model, probe_batches=tiny_batches(2), num_active_layers=2) as tuner, lacks:
        train_with_two("begin and end", model, optimizers, tuner, tiny_batches(1)[0])
