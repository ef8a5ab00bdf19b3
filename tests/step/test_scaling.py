"""What a GradScaler does to a step is seen, whatever optimizers and scaler there are; its class is let alone after."""

from __future__ import annotations

import functools
import gc
import importlib.util
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.amp.grad_scaler import GradScaler

from ist import IST, SparseTuner
from ist.integrations.finite import FiniteWeightsCallback
from ist.step import scaling
from ist.step.boundary import Boundary
from ist.step.skipped import MOST_SKIPPED, SkippedError
from tests.helpers.tiny import tiny_batches, tiny_lora, trainable
from tests.helpers.trainers import make_trainer

BATCH = tiny_batches(1, size=1)[0]
SKIPS: dict[str, Any] = {"init_scale": 3e38, "backoff_factor": 0.9999}
"""Of a scaler that makes every gradient infinite."""
STEPS: dict[str, Any] = {"init_scale": 2.0}
"""Of one that does not."""
PLAIN = GradScaler.step
STOPPED = rf"NaN or infinite in the last {MOST_SKIPPED} steps, which the GradScaler has skipped"
CALLBACKS = {"IST": lambda: IST(selector="all"), "none": FiniteWeightsCallback}


def own_step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    """Decides by itself, as scalers of other devices do."""
    self.unscale_(optimizer)
    return self._maybe_opt_step(optimizer, self._per_optimizer_states[id(optimizer)], *args, **kwargs)


class OwnStep(GradScaler):
    """Has a step of its own."""

    step = own_step


class OwnKind:
    """A scaler that is not made from PyTorch's, and skips the first of every `skipped` + 1 steps."""

    def __init__(self, skipped: int) -> None:
        self.skipped, self.num = skipped, 0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def unscale_(self, optimizer: Any) -> None:
        pass

    def step(self, optimizer: Any, *args: Any) -> None:
        self.num += 1
        if self.num % (self.skipped + 1) == 0:
            optimizer.step()

    def update(self) -> None:
        pass


class Slotted:
    """An optimizer that is not of PyTorch's kind, nor to be referred to weakly."""

    __slots__ = ("num", "param_groups")

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.param_groups, self.num = [{"params": parameters, "lr": 1e-3}], 0

    def step(self) -> None:
        self.num += 1


@pytest.fixture
def alone() -> Iterator[None]:
    """Nobody else listens."""
    gc.collect()
    others = list(scaling.listeners)
    for other in others:
        scaling.unlisten(other)
    yield
    for other in others:
        scaling.listen(other)


def loops(tuner: SparseTuner, optimizers: list[Any], scalers: list[Any], num: int) -> Iterator[int]:
    """Trains so many steps, with all the optimizers in each."""
    for number in range(1, num + 1):
        tuner.begin_step()
        loss = tuner.model(**BATCH).loss
        scalers[0].scale(loss).backward()
        for scaler in scalers[1:]:
            scaler.scale(torch.zeros(()))  # A scaler steps where it has scaled.
        for place, optimizer in enumerate(optimizers):
            scalers[place % len(scalers)].step(optimizer)
        for scaler in scalers:
            scaler.update()
        for parameter in trainable(tuner.model):
            parameter.grad = None
        tuner.end_step(optimizers[0])
        yield number


def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


@pytest.mark.filterwarnings("ignore:The optimizer lacks trainable parameters")
@pytest.mark.parametrize("own_scalers", [False, True])
@pytest.mark.parametrize("num", [1, 2, 16])
def test_a_step_of_several_optimizers_is_skipped_once(num: int, own_scalers: bool) -> None:
    model = tiny_lora(4)
    with SparseTuner(model, selector="all") as tuner:
        optimizers = [sgd(trainable(model)[place::num]) for place in range(num)]
        scalers = [GradScaler("cpu", **SKIPS) for _ in range(num if own_scalers else 1)]
        steps = loops(tuner, optimizers, scalers, 2 * MOST_SKIPPED)
        assert list(itertools.islice(steps, MOST_SKIPPED)) == list(range(1, MOST_SKIPPED + 1))
        with pytest.raises(SkippedError, match=STOPPED):
            next(steps)
        tuner._parts.boundary.count_anew()
        for _ in loops(tuner, optimizers, [GradScaler("cpu", **SKIPS)], 10):
            pass
        assert tuner._parts.boundary.num_skipped == 10
        for _ in loops(tuner, optimizers, [GradScaler("cpu", **STEPS)], 1):
            pass
        assert tuner._parts.boundary.num_skipped == 0, "an update by any is one of the step"


@pytest.mark.parametrize("options", [STEPS, {"enabled": False}])
def test_an_optimizer_that_is_not_of_pytorch_s_kind_counts_as_having_stepped(options: dict[str, Any]) -> None:
    model = tiny_lora(2)
    with SparseTuner(model, selector="all") as tuner:
        optimizer = Slotted(trainable(model))
        for _ in loops(tuner, [optimizer], [GradScaler("cpu", **options)], MOST_SKIPPED + 5):
            assert tuner._parts.boundary.num_skipped == 0
    assert tuner.num_steps == optimizer.num == MOST_SKIPPED + 5


def test_an_optimizer_that_is_not_of_pytorch_s_kind_and_is_skipped_stops_the_training() -> None:
    model = tiny_lora(2)
    with SparseTuner(model, selector="all") as tuner:
        optimizer = Slotted(trainable(model))
        with pytest.raises(SkippedError, match=STOPPED):
            list(loops(tuner, [optimizer], [GradScaler("cpu", **SKIPS)], 2 * MOST_SKIPPED))
    assert optimizer.num == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_scaler_with_a_step_of_its_own_is_heard(when: str) -> None:
    """Also where its class is made in the middle of a training."""
    model = tiny_lora(2)
    with SparseTuner(model, selector="all") as tuner:
        kind = OwnStep if when == "before" else type("Later", (GradScaler,), {"step": own_step})
        steps = loops(tuner, [sgd(trainable(model))], [kind("cpu", **SKIPS)], 2 * MOST_SKIPPED)
        with pytest.raises(SkippedError, match=STOPPED):
            list(steps)
        assert tuner.num_steps == 0
        list(loops(tuner, [sgd(trainable(model))], [kind("cpu", **STEPS)], 2))
        assert tuner.num_steps == 2


def infinite(model: Any) -> Any:
    for parameter in trainable(model):
        parameter.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    return model


@pytest.mark.parametrize("make", [lambda: OwnStep("cpu", **SKIPS), lambda: OwnKind(1000)])
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_trainer_stops_whatever_its_scaler(name: str, make: Callable[[], Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "no", "max_steps": 2 * MOST_SKIPPED, "optim": "sgd"}
    trainer = make_trainer(tmp_path, CALLBACKS[name](), model=infinite(tiny_lora()), **options)
    trainer.accelerator.scaler = make()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        with pytest.raises(SkippedError, match=STOPPED):
            trainer.train()
    assert trainer.state.global_step == MOST_SKIPPED


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_trainer_trains_with_a_scaler_that_skips_often(name: str, tmp_path: Path) -> None:
    steps = 2 * MOST_SKIPPED + 10
    trainer = make_trainer(tmp_path, CALLBACKS[name](), save_strategy="no", max_steps=steps, optim="sgd")
    trainer.accelerator.scaler = OwnKind(2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        trainer.train()
    assert trainer.state.global_step == steps


def test_a_loop_of_accelerate_stops_whatever_its_scaler() -> None:
    """And counts no micro-batch."""
    model = tiny_lora(2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerator.scaler = OwnKind(1000)  # pyright: ignore[reportAttributeAccessIssue]
    optimizer = accelerator.prepare(sgd(trainable(model)))
    with SparseTuner(model, selector="all") as tuner:

        def micro_batch() -> None:
            with tuner.step(optimizer), accelerator.accumulate(model):
                accelerator.backward(model(**BATCH).loss)
                optimizer.step()
                optimizer.zero_grad()

        for _ in range(2 * MOST_SKIPPED):
            micro_batch()
        with pytest.raises(SkippedError, match=STOPPED):
            micro_batch()


def test_accelerate_is_asked_where_its_scaler_is_not_heard() -> None:
    """Its flag stays until its next step, and says of updates too, which may be of an optimizer that does not."""
    boundary = Boundary([])
    optimizer = SimpleNamespace(scaler=OwnKind(2))
    for optimizer.step_was_skipped, num in ((True, 1), (True, 2), (False, 0), (True, 1)):
        boundary.ask(optimizer)
        assert boundary.num_skipped == num
    optimizer.scaler = GradScaler("cpu")
    boundary.ask(optimizer)
    assert boundary.num_skipped == 1, "what is heard is not counted twice"
    boundary.ask(None)
    boundary.close()


def test_parameters_that_a_group_gets_later_are_seen() -> None:
    model = tiny_lora(2)
    weight = torch.nn.Parameter(torch.ones(1))
    with SparseTuner(model, selector="all") as tuner:
        optimizer = sgd([weight])
        weight.grad = torch.ones(1)
        optimizer.step()
        optimizer.param_groups[0]["params"].extend(trainable(model))
        list(loops(tuner, [optimizer], [GradScaler("cpu", **STEPS)], 3))
    assert tuner.num_steps == 3


@pytest.mark.usefixtures("alone")
def test_a_second_import_hears_and_lets_the_first_one_hear() -> None:
    spec = importlib.util.spec_from_file_location("imported_again", scaling.__file__)
    assert spec
    assert spec.loader
    again: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    models = [tiny_lora(2) for _ in range(2)]
    first, second = (SparseTuner(model, selector="all") for model in models)
    boundary: Any = second._parts.boundary
    scaling.unlisten(boundary)
    again.listen(boundary)
    for tuner in (first, second):
        optimizer, scaler = sgd(trainable(tuner.model)), GradScaler("cpu", **SKIPS)
        scaler.scale(tuner.model(**BATCH).loss).backward()
        scaler.step(optimizer)
        assert tuner._parts.boundary.num_skipped == 1
    first.close()
    assert GradScaler.step is not PLAIN
    again.unlisten(boundary)
    assert GradScaler.step is PLAIN


@pytest.mark.usefixtures("alone")
def test_the_classes_of_scalers_are_as_they_were_after_the_last_one() -> None:
    for _ in range(2):
        tuners = [SparseTuner(tiny_lora(2), selector="all") for _ in range(2)]
        for tuner in tuners:
            assert GradScaler.step is not PLAIN
            assert OwnStep.step is not own_step
            tuner.close()
        assert GradScaler.step is PLAIN
        assert OwnStep.step is own_step


@pytest.mark.usefixtures("alone")
def test_what_somebody_else_has_wrapped_in_turn_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GradScaler, "step", PLAIN)  # Undone after the test.
    model = tiny_lora(2)
    tuner = SparseTuner(model, selector="all")
    inner, calls = GradScaler.step, []

    @functools.wraps(inner)
    def theirs(*args: Any) -> Any:
        calls.append(args)
        return inner(*args)

    GradScaler.step = theirs  # pyright: ignore[reportAttributeAccessIssue]
    tuner.close()
    assert GradScaler.step is theirs
    with SparseTuner(model, selector="all") as tuner:
        assert GradScaler.step is theirs
        list(loops(tuner, [sgd(trainable(model))], [GradScaler("cpu", **SKIPS)], 2))
        assert tuner._parts.boundary.num_skipped == len(calls) == 2


@pytest.mark.usefixtures("alone")
def test_a_tuner_that_is_dropped_is_freed_and_listens_no_more() -> None:
    tuner = SparseTuner(tiny_lora(2), selector="all")
    boundary = weakref.ref(tuner._parts.boundary)
    assert GradScaler.step is not PLAIN
    del tuner
    gc.collect()
    assert boundary() is None
    assert GradScaler.step is PLAIN
