"""LoRA-FA's optimizer, which takes A and B as a pair, passes frozen layers by and is as before afterwards."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer

from ist import SparseTuner
from ist.adapters.lora_fa import pair_name
from tests.helpers.tiny import layer_of, moved_layers, snapshot, tiny_batches, tiny_lora, traces


def make_optimizer(model: Any) -> torch.optim.Optimizer:
    return create_lorafa_optimizer(model=model, r=4, lora_alpha=8, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("with_closure", [False, True])
def test_only_active_layers_move(with_closure: bool, attached: bool) -> None:
    model = tiny_lora()
    optimizer = make_optimizer(model)
    with SparseTuner(model, num_active_layers=2, update_interval=2, probe_batches=tiny_batches(1)) as tuner:
        if attached:
            tuner.attach_optimizer(optimizer)
        for batch in tiny_batches(6):
            active, before = tuner.begin_step(), snapshot(model)

            def backward(batch: Any = batch) -> Any:
                with torch.enable_grad():  # peft's step calls it without gradients
                    loss = model(**batch).loss
                    loss.backward()
                return loss

            if with_closure:
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
            optimizer.zero_grad()
            assert moved_layers(before, snapshot(model)) == set(active)
            tuner.end_step(optimizer)


def test_with_all_layers_active_it_is_pefts_own() -> None:
    models = [tiny_lora(), tiny_lora()]
    optimizers = [make_optimizer(model) for model in models]
    with SparseTuner(models[0], num_active_layers=1.0, probe_batches=tiny_batches(1)) as tuner:
        tuner.attach_optimizer(optimizers[0])
        for batch in tiny_batches(3):
            tuner.begin_step()
            for model, optimizer in zip(models, optimizers, strict=True):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            tuner.end_step()
    expected = snapshot(models[1])
    assert all(torch.equal(value, expected[name]) for name, value in snapshot(models[0]).items())


def test_groups_are_whole_after_a_step_and_after_one_that_raised() -> None:
    model = tiny_lora()
    optimizer = make_optimizer(model)
    names = list(optimizer.param_groups[0]["names"])
    with SparseTuner(model, num_active_layers=1, probe_batches=tiny_batches(1)) as tuner:
        tuner.attach_optimizer(optimizer)
        (active,) = tuner.begin_step()

        def fail() -> None:
            assert {layer_of(name) for name in optimizer.param_groups[0]["names"] if "lora" in name} == {active}
            raise KeyError

        with pytest.raises(KeyError):
            optimizer.step(fail)  # type: ignore[arg-type]
        model(**tiny_batches(1)[0]).loss.backward()
        optimizer.step()
        assert optimizer.param_groups[0]["names"] == names
        with pytest.raises(KeyError):
            optimizer.step(fail)  # type: ignore[arg-type]
    assert optimizer.param_groups[0]["names"] == names
    assert len(optimizer.param_groups[0]["params"]) == len(names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("layers.0.q.lora_A.default.weight", "layers.0.q."), ("layers.0.q.lora_B.x", "layers.0.q."), ("head.w", "head.w")],
)
def test_what_makes_a_pair(name: str, expected: str) -> None:
    assert pair_name(name) == expected


def test_a_tuner_that_is_dropped_in_a_step_leaves_the_optimizer_and_the_model_as_they_were() -> None:
    """Nobody closed it, and the optimizer lives on."""
    model = tiny_lora()
    optimizer = make_optimizer(model)
    before = traces(model)
    names = list(optimizer.param_groups[0]["names"])
    tuner = SparseTuner(model, num_active_layers=1, probe_batches=tiny_batches(1))
    tuner.attach_optimizer(optimizer)
    tuner.begin_step()

    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(fail)  # type: ignore[arg-type]
    del tuner
    gc.collect()
    assert optimizer.param_groups[0]["names"] == names
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert traces(model) == before
