"""The greedy search: what it finds, what it costs, and that it leaves nothing behind."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from ist import FixedSelector, SparseTuner
from ist.experiments.greedy import GreedySearch, count_trainings, greedy_layers, search_greedily
from ist.runtime.modes import evaluation_mode
from tests.helpers.tiny import snapshot, tiny_batches, tiny_llama, tiny_lora, traces

GAINS = (0.1, 0.5, 0.0, 0.4, 0.5)


def additive(layers: tuple[int, ...]) -> float:
    return 2.0 - sum(GAINS[layer] for layer in layers)


@pytest.mark.parametrize(
    ("num_chosen", "min_gain", "layers", "trainings"),
    [
        (1, None, (1,), 5),
        (3, None, (1, 4, 3), 12),
        (5, None, (1, 4, 3, 0, 2), 15),
        (5, 0.05, (1, 4, 3, 0), 15),  # the last trial is made before it is refused
        (5, 0.45, (1, 4), 12),
        (3, 9.0, (1,), 9),  # the first is always added
    ],
)
def test_the_layer_that_helps_most_is_added(
    num_chosen: int, min_gain: float | None, layers: tuple[int, ...], trainings: int
) -> None:
    found = search_greedily(5, num_chosen, additive, min_gain)
    assert found.layers == layers
    assert found.losses == pytest.approx([additive(layers[: n + 1]) for n in range(len(layers))])
    assert len(found.trials) == trainings <= count_trainings(5, num_chosen)
    assert len({tried for tried, _ in found.trials}) == trainings
    assert all(tuple(sorted(tried)) == tried and loss == additive(tried) for tried, loss in found.trials)


def test_layers_that_help_together_are_seen_together() -> None:
    """Greedy is not the sum of single effects: with 0 chosen, 2 becomes the best."""
    losses = {(0,): 1.0, (1,): 1.1, (2,): 1.5, (0, 1): 0.9, (0, 2): 0.2}
    assert search_greedily(3, 2, losses.__getitem__).layers == (0, 2)


def test_a_loss_that_is_no_number_is_the_worst() -> None:
    losses: dict[tuple[int, ...], float] = {(0,): float("nan"), (1,): 5.0, (2,): 6.0}
    assert search_greedily(3, 1, losses.__getitem__).layers == (1,)


@pytest.mark.parametrize("num_layers", [2, 7])
def test_the_number_of_trainings(num_layers: int) -> None:
    for num_chosen in range(1, num_layers + 1):
        found = search_greedily(num_layers, num_chosen, lambda layers: float(len(layers)))
        assert len(found.trials) == count_trainings(num_layers, num_chosen)
    assert count_trainings(30, 8) == 212  # the example in docs/baselines.md


def search(model: Any, **options: Any) -> GreedySearch:
    return greedy_layers(
        model,
        **{
            "train_batches": tiny_batches(3),
            "validation_batches": tiny_batches(2, seed=5),
            "num_steps": 4,
            "learning_rate": 0.01,
            "num_active_layers": 2,
            **options,
        },
    )


@pytest.mark.parametrize("make", [lambda: tiny_lora(lora_dropout=0.1), tiny_llama], ids=["adapters", "whole layers"])
def test_a_search_leaves_the_model_and_the_generators_as_they_were(make: Any) -> None:
    model = make()
    model.eval()
    before, marks = snapshot(model), traces(model)
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    states = (torch.get_rng_state().clone(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    found = search(model)
    assert len(found.layers) == 2
    assert (len(found.trials), found.num_steps) == (7, 28)
    assert found.seconds > 0
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    assert traces(model) == marks
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # type: ignore[index]
    assert search(make()).trials == found.trials  # and the same again


def test_a_trial_is_a_training_of_these_layers_alone() -> None:
    """Its loss is that of a loop by hand."""
    found = search(tiny_lora())
    model = tiny_lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    with SparseTuner(model, selector=partial(FixedSelector, layers=found.layers)) as tuner:
        for step in range(4):
            tuner.begin_step()
            model(**tiny_batches(3)[step % 3]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tuner.end_step(optimizer)
    with torch.no_grad(), evaluation_mode(model):
        losses = [float(model(**batch).loss) for batch in tiny_batches(2, seed=5)]
    tried = dict(found.trials)
    assert tried[tuple(sorted(found.layers))] == sum(losses) / 2 == found.losses[1]
    assert set(tried) >= {(layer,) for layer in range(4)}
    assert tried[found.layers[:1]] == min(tried[layer,] for layer in range(4)) == found.losses[0]


def test_after_an_exception_the_model_is_as_before() -> None:
    model = tiny_lora()
    before, marks = snapshot(model), traces(model)
    tried = []

    def stop(layers: tuple[int, ...], loss: float) -> None:
        tried.append(layers)
        if len(tried) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(model, on_trial=stop)
    assert tried == [(0,), (1,), (2,)]
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    assert traces(model) == marks


def adalora() -> Any:
    from peft import AdaLoraConfig, get_peft_model

    return get_peft_model(tiny_llama(), AdaLoraConfig(total_step=10, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (tiny_lora, {"train_batches": []}, "needs at least one training and one validation batch"),
        (tiny_lora, {"validation_batches": []}, "needs at least one training and one validation batch"),
        (tiny_lora, {"num_steps": 0}, "num_steps=0 is not a whole number of at least 1"),
        (tiny_lora, {"num_active_layers": 5}, "num_active_layers=5 is more than the 4 layers"),
        (tiny_lora, {"beta": 2}, "beta=2 is not a number in"),
        (adalora, {}, "The greedy search does not go with AdaLoRA"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, options: dict[str, Any], message: str) -> None:
    model = make()
    before = traces(model)
    with pytest.raises(ValueError, match=message):
        search(model, **options)
    assert traces(model) == before
