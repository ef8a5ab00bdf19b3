"""Optimizers that move frozen layers by ways that count nowhere are refused, soon."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from ist import SparseTuner
from ist.step.frozen_check import SAMPLE_INTERVAL, same
from tests.helpers.tiny import cycle, tiny_batches, tiny_lora, trainable

NAN, INF = float("nan"), float("inf")


class Decays(torch.optim.SGD):
    """Weight decay through `.data`, of every parameter, from a step on."""

    begin = 0
    num = 0

    def step(self, closure: Any = None) -> Any:
        """A step, and the decay."""
        self.num += 1
        if self.num > self.begin:
            for parameter in self.param_groups[0]["params"]:
                self.write(parameter)
        return super().step(closure)

    def write(self, parameter: Any) -> None:
        """In place."""
        parameter.data.mul_(0.9)


class Swaps(Decays):
    """With other tensors in the places of the old ones."""

    def write(self, parameter: Any) -> None:
        """Anew."""
        parameter.data = parameter.data * 0.9


class OldMomentum(torch.optim.Optimizer):
    """Momentum as optimizers had it once: what has trained moves further, with a gradient or without."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        """Through `.data`."""
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if parameter.grad is not None:
                state["mean"] = parameter.grad.clone()
            if "mean" in state:
                parameter.data.sub_(state["mean"], alpha=self.param_groups[0]["lr"])


def steps_made(optimizer: Any, model: Any, selector: str, most: int) -> int:
    tuner = SparseTuner(model, selector=selector, num_active_layers=2)
    for batch in itertools.islice(cycle(tiny_batches(2)), most):
        with tuner.step(optimizer):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return tuner.num_steps


@pytest.mark.parametrize("kind", [Decays, Swaps, OldMomentum])
def test_writes_through_data_are_seen(kind: Any) -> None:
    model = tiny_lora()
    optimizer = kind(trainable(model), lr=0.1)
    with pytest.raises(ValueError, match=rf"{kind.__name__} has moved the adapters in \S+, which is frozen"):
        steps_made(optimizer, model, "random", SAMPLE_INTERVAL)


def test_those_that_come_later_are_seen_too() -> None:
    model = tiny_lora()
    optimizer = Decays(trainable(model), lr=0.1)
    optimizer.begin = 2 * SAMPLE_INTERVAL + 3
    with pytest.raises(ValueError, match="Decays has moved the adapters in"):
        steps_made(optimizer, model, "fixed:0", 4 * SAMPLE_INTERVAL)
    assert optimizer.num == 3 * SAMPLE_INTERVAL + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("selector", ["random", "fixed:0", "ist"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_optimizers_that_leave_frozen_layers_alone_pass(kind: Any, selector: str, dtype: torch.dtype) -> None:
    model = tiny_lora().to(dtype)
    assert steps_made(kind(trainable(model), lr=0.01), model, selector, 3 * SAMPLE_INTERVAL) == 3 * SAMPLE_INTERVAL


@pytest.mark.parametrize(("one", "other", "expected"), [
    ([1.0, NAN], [1.0, NAN], True), ([1.0, 2.0], [1.0, 2.0], True), ([INF, NAN], [INF, NAN], True),
    ([0.0, NAN], [1.0, NAN], False), ([1.0, 0.0], [1.0, NAN], False), ([INF], [-INF], False),
])  # fmt: skip
def test_numbers_that_are_nan_have_not_moved(one: list[float], other: list[float], expected: bool) -> None:
    """The check of the weights reports NaN (`test_finite`); this one does not blame the optimizer for it."""
    assert same(torch.tensor(one), torch.tensor(other)) is expected
