"""`with tuner.step(optimizer)`: a step is an optimizer step, whatever the gradient accumulation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import AdaLoraConfig, get_peft_model

from ist import History, SparseTuner, read_history
from tests.helpers.tiny import moved_layers, snapshot, tiny_batches, tiny_llama, tiny_lora, trainable

MICRO = 2
"""Micro-batches of an optimizer step."""


def make() -> tuple[Any, torch.optim.Optimizer, SparseTuner, list[Any]]:
    """A model in double precision, its optimizer, a tuner that learns every second step, and twelve micro-batches."""
    model = tiny_lora().double()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tuner = SparseTuner(model, num_active_layers=1, update_interval=2, probe_batches=tiny_batches(3, seed=9))
    return model, optimizer, tuner, tiny_batches(12)


def whole_steps() -> tuple[dict[str, torch.Tensor], list[tuple[int, ...]]]:
    """The reference: begin and end around each optimizer step."""
    model, optimizer, tuner, batches = make()
    chosen = []
    for start in range(0, len(batches), MICRO):
        chosen.append(tuner.begin_step())
        for batch in batches[start : start + MICRO]:
            (model(**batch).loss / MICRO).backward()
        optimizer.step()
        optimizer.zero_grad()
        tuner.end_step(optimizer)
    return snapshot(model), chosen


def modulo(model: Any, optimizer: Any, tuner: SparseTuner, batches: list[Any]) -> list[tuple[int, ...]]:
    chosen = []
    for number, batch in enumerate(batches, 1):
        with tuner.step(optimizer) as active:
            (model(**batch).loss / MICRO).backward()
            if number % MICRO == 0:
                optimizer.step()
                optimizer.zero_grad()
                chosen.append(active)
    return chosen


def stepped_after_the_block(
    model: Any, optimizer: Any, tuner: SparseTuner, batches: list[Any]
) -> list[tuple[int, ...]]:
    chosen = []
    for number, batch in enumerate(batches, 1):
        with tuner.step(optimizer) as active:
            (model(**batch).loss / MICRO).backward()
        if number % MICRO == 0:
            optimizer.step()
            optimizer.zero_grad()
            chosen.append(active)
    return chosen


def accelerate(model: Any, optimizer: Any, tuner: SparseTuner, batches: list[Any]) -> list[tuple[int, ...]]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    model, optimizer = accelerator.prepare(model, optimizer)
    chosen = []
    for batch in batches:
        with tuner.step(optimizer) as active, accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                chosen.append(active)
    return chosen


def begun_and_ended_for_each_micro_batch(
    model: Any, optimizer: Any, tuner: SparseTuner, batches: list[Any]
) -> list[tuple[int, ...]]:
    chosen = []
    for number, batch in enumerate(batches, 1):
        active = tuner.begin_step()
        (model(**batch).loss / MICRO).backward()
        if number % MICRO == 0:
            optimizer.step()
            optimizer.zero_grad()
            chosen.append(active)
        tuner.end_step(optimizer)
    return chosen


LOOPS: list[Callable[..., list[tuple[int, ...]]]] = [
    modulo, stepped_after_the_block, accelerate, begun_and_ended_for_each_micro_batch,
]  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_every_way_to_accumulate_trains_as_whole_steps_do(loop: Callable[..., Any]) -> None:
    expected, expected_choices = whole_steps()
    model, optimizer, tuner, batches = make()
    chosen = loop(model, optimizer, tuner, batches)
    assert chosen == expected_choices
    assert tuner.num_steps == len(batches) // MICRO
    trained = snapshot(model)
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skips_is_no_step(fused: bool) -> None:
    model, optimizer, tuner, batches = make()
    if fused:  # It is called, and skips by itself.
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)  # pyright: ignore[reportPrivateImportUsage]
    seen = []
    for number, batch in enumerate(batches[:3]):
        with tuner.step(optimizer) as active:
            seen.append(active)
            scaler.scale(model(**batch).loss).backward()
            if number == 0:
                next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert tuner.num_steps == 2
    assert seen[0] == seen[1]


def test_an_exception_in_a_block_leaves_the_model_as_peft_made_it_and_the_step_to_be_made() -> None:
    model, optimizer, tuner, batches = make()
    with pytest.raises(KeyboardInterrupt), tuner.step(optimizer) as first:
        raise KeyboardInterrupt
    assert tuner.active_layers is None
    model(**batches[0]).loss.backward()
    assert all(p.grad is not None for layer in tuner.layers for p in layer.parameters)
    optimizer.zero_grad()
    with tuner.step(optimizer) as again:
        assert again == first


def test_misuse_is_one_line() -> None:
    _, optimizer, tuner, _ = make()
    with tuner.step(optimizer), pytest.raises(ValueError, match=r"inside of tuner\.step\(\)"):  # noqa: SIM117
        with tuner.step(optimizer):
            pass
    tuner.close()
    with pytest.raises(ValueError, match="closed"), tuner.step(optimizer):
        pass


class Shrinks(torch.optim.SGD):
    """Weight decay that does not look whether there is a gradient."""

    def step(self, closure: Any = None) -> Any:
        """A step, and the decay of all parameters."""
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.mul_(0.99)
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Shrinks])
@pytest.mark.parametrize("selector", ["fixed:0,1", "all"])
def test_an_optimizer_that_moves_frozen_layers_is_refused(kind: Any, selector: str) -> None:
    """LBFGS moves what trained in earlier steps along, which is nothing in the first."""
    model, batches = tiny_lora(), tiny_batches(2)
    torch.optim.SGD([torch.ones(1, requires_grad=True)])  # From here on, the base class has hooks of its own.
    optimizer = kind(trainable(model), lr=0.1)
    for _ in range(2):  # The directions of the first training, of all layers.
        optimizer.step(lambda: closure(model, optimizer, batches[0]))
    tuner = SparseTuner(model, selector=selector)
    refused = pytest.raises(
        ValueError, match=rf"{kind.__name__} has moved the adapters in .*layers\.2, which is frozen"
    )
    with refused if selector != "all" else nullcontext(), tuner.step(optimizer):
        optimizer.step(lambda: closure(model, optimizer, batches[1]))
    assert tuner.active_layers is None
    assert tuner.num_steps == (selector == "all")


def test_an_optimizer_may_write_what_was_there() -> None:
    """Such as a limit to the size of weights, after each step."""
    model, batches = tiny_lora(), tiny_batches(3)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)

    def limit(*_: Any) -> None:
        with torch.no_grad():
            for parameter in trainable(model):
                parameter.clamp_(-100, 100)

    optimizer.register_step_post_hook(limit)
    tuner = SparseTuner(model, selector="fixed:0,1")
    for batch in batches:
        with tuner.step(optimizer):
            closure(model, optimizer, batch)
            optimizer.step()
    assert tuner.num_steps == 3


class Inherits(torch.optim.AdamW):
    """Its `step` is that of its base class, whose hooks run for both."""

    def step(self, closure: Any = None) -> Any:
        """A step."""
        return super().step(closure)


@pytest.mark.parametrize("ends_late", [False, True])
def test_a_step_of_micro_batches_counts_once(ends_late: bool) -> None:
    """`begin_step` once, then `end_step` for each micro-batch, before or after the optimizer's step."""
    model, batches = tiny_lora(), tiny_batches(4)
    torch.optim.AdamW(trainable(tiny_lora())).step()  # From here on, the class has hooks of its own.
    optimizer = Inherits(trainable(model), lr=0.1)
    tuner = SparseTuner(model, selector="fixed:0,2")
    for pair in (batches[:2], batches[2:]):
        optimizer.zero_grad()
        tuner.begin_step()
        before = snapshot(model)
        for batch in pair:
            model(**batch).loss.backward()
            if batch is pair[0] or not ends_late:
                tuner.end_step(optimizer)
        optimizer.step()
        if ends_late:
            tuner.end_step(optimizer)
        assert moved_layers(before, snapshot(model)) == {0, 2}
    assert tuner.num_steps == 2


def closure(model: Any, optimizer: Any, batch: Any) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss


def test_a_step_of_several_micro_batches_is_one_line_of_the_history(tmp_path: Path) -> None:
    model, optimizer, tuner, batches = make()
    tuner.record_to(History(tmp_path / "history.jsonl"))
    begun_and_ended_for_each_micro_batch(model, optimizer, tuner, batches)
    steps = [event["step"] for event in read_history(tmp_path / "history.jsonl") if event["event"] == "step"]
    assert steps == list(range(1, len(batches) // MICRO + 1))


def test_an_exception_is_not_blamed_on_adalora(recwarn: pytest.WarningsRecorder) -> None:
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=50, tinit=5, tfinal=5)
    model = get_peft_model(tiny_llama(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    tuner = SparseTuner(model, num_active_layers=1, probe_batches=tiny_batches(1))
    with pytest.raises(KeyboardInterrupt), tuner.step(optimizer):
        raise KeyboardInterrupt
    assert not [warning for warning in recwarn if "allocated" in str(warning.message)]
