"""A training of which a GradScaler skips every step says so, and one whose weights are NaN from the start too."""

from __future__ import annotations

import gc
import itertools
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.amp.grad_scaler import GradScaler

from ist import IST, SparseTuner
from ist.integrations.finite import FiniteWeightsCallback
from ist.runs.checkpoints import MANIFEST_FILE, write_manifest
from ist.step.boundary import Boundary
from ist.step.finite import BrokenStartError, NotFiniteError
from ist.step.skipped import MOST_SKIPPED, SkippedError, SkippedSteps
from ist.step.unhooked import TELLS
from tests.helpers.tiny import cycle, tiny_batches, tiny_lora, trainable
from tests.helpers.trainers import make_trainer

NAN = float("nan")
LOST = rf"The last {MOST_SKIPPED} steps ended without an update"
STOPPED = rf"NaN or infinite in the last {MOST_SKIPPED} steps, which the GradScaler has skipped"
CLEARED = ("after the update", "before the block", "in its beginning", "before the backward", "never")
"""Where a loop clears the gradients."""


def scaler(skips: bool = True) -> Any:
    """Its scale makes every gradient infinite, for as long as it takes."""
    scale, backoff = (3e38, 0.9999) if skips else (2.0, 0.5)
    return torch.amp.GradScaler("cpu", scale, backoff_factor=backoff)  # pyright: ignore[reportPrivateImportUsage]


def by_hand(optimizer: torch.optim.Optimizer, number: int) -> None:
    """A loop that skips every update by itself."""


class Loop:
    """Steps in one of the ways that loops are written in.

    Args:
        cleared: where gradients are cleared, in the first micro-batch of a step.
        update: what is done after the last one.
    """

    def __init__(
        self,
        tuner: SparseTuner,
        way: str = "step",
        cleared: str = CLEARED[0],
        update: Callable[[torch.optim.Optimizer, int], None] | None = None,
        micro: int = 1,
        to_none: bool = True,
        fused: bool = False,
    ) -> None:
        self.tuner, self.way, self.cleared, self.micro, self.to_none = tuner, way, cleared, micro, to_none
        kind: Any = partial(torch.optim.AdamW, fused=True) if fused else torch.optim.SGD
        self.optimizer = kind(trainable(tuner.model), lr=1e-3)
        self.scaler = scaler()
        self.update = update or self.scaled_update
        self.num_updates = 0
        """Calls of `update`."""

    def scaled_update(self, optimizer: torch.optim.Optimizer, number: int) -> None:
        self.scaler.step(optimizer)
        self.scaler.update()

    def run(self, steps: int, skips: bool = True) -> None:
        self.scaler = scaler(skips)
        for number, batch in enumerate(itertools.islice(cycle(tiny_batches(2, size=1)), steps * self.micro)):
            self.first, self.last = number % self.micro == 0, (number + 1) % self.micro == 0
            self.clear("before the block")
            if self.way == "begin_step":
                self.tuner.begin_step()
                self.within(batch, number)
                self.tuner.end_step(self.optimizer)
            else:
                with self.tuner.step(self.optimizer):
                    self.within(batch, number)

    def within(self, batch: Any, number: int) -> None:
        self.clear("in its beginning")
        loss = self.scaler.scale(self.tuner.model(**batch).loss)
        self.clear("before the backward")
        loss.backward()
        if self.last:
            self.num_updates += 1
            self.update(self.optimizer, number)
        self.clear("after the update")

    def clear(self, place: str) -> None:
        if place == self.cleared and (self.last if place == "after the update" else self.first):
            self.optimizer.zero_grad(set_to_none=self.to_none)


@pytest.mark.parametrize(
    ("micro", "to_none", "fused"), [(1, True, False), (3, True, False), (1, False, False), (2, True, True)]
)
@pytest.mark.parametrize("cleared", CLEARED)
@pytest.mark.parametrize("way", ["begin_step", "step"])
def test_a_loop_whose_steps_are_all_skipped_stops(
    way: str, cleared: str, micro: int, to_none: bool, fused: bool
) -> None:
    """Wherever it clears its gradients; fused optimizers skip by themselves."""
    tuner = SparseTuner(tiny_lora(2, target_modules=["q_proj"]), selector="random", num_active_layers=1)
    loop = Loop(tuner, way, cleared, micro=micro, to_none=to_none, fused=fused)
    with pytest.raises(SkippedError, match=STOPPED) as caught:
        loop.run(2 * MOST_SKIPPED)
    assert loop.num_updates == MOST_SKIPPED
    assert "\n" not in str(caught.value)
    assert tuner.num_steps == 0
    loop.optimizer.zero_grad()
    loop.run(2, skips=False)
    assert tuner.num_steps == 2, "a loop that mends it may continue"


def test_an_update_in_between_counts_anew_and_other_optimizers_are_none_of_ours() -> None:
    tuner = SparseTuner(tiny_lora(2), selector="all")
    for cleared in CLEARED[:-1]:
        loop = Loop(tuner, cleared=cleared)
        for _ in range(2):
            loop.run(MOST_SKIPPED - 1)
            loop.run(1, skips=False)
    assert tuner.num_steps == 2 * (len(CLEARED) - 1)
    weight = torch.nn.Parameter(torch.ones(1))
    other, scale = torch.optim.SGD([weight]), scaler()
    for _ in range(MOST_SKIPPED + 1):
        scale.scale(weight.sum() * 1e5).backward()
        scale.step(other)
        scale.update()
    assert tuner._parts.boundary.num_skipped == 0


def test_the_class_of_scalers_is_wrapped_once_and_steps_as_before() -> None:
    tuners = [SparseTuner(tiny_lora(2), selector="all") for _ in range(2)]
    assert hasattr(GradScaler.step, "__wrapped__")
    assert not hasattr(GradScaler.step.__wrapped__, "__wrapped__")  # pyright: ignore[reportFunctionMemberAccess]
    loop = Loop(tuners[0])
    loop.run(1)
    assert [tuner._parts.boundary.num_skipped for tuner in tuners] == [1, 0]
    tuners[0].close()
    bare = SimpleNamespace(_step_supports_amp_scaling=True, step=lambda grad_scaler=None: 5.0)
    with pytest.warns(FutureWarning, match="GradScaler is going to stop passing itself"):
        assert loop.scaler.step(bare) == 5.0
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        loop.scaled_update(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), 0)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("way", ["begin_step", "step"])
def test_a_loop_that_skips_by_itself_is_told_once(way: str, to_none: bool) -> None:
    tuner = SparseTuner(tiny_lora(2), selector="all")
    loop = Loop(tuner, way, update=by_hand, to_none=to_none)
    with pytest.warns(UserWarning, match=LOST if to_none else "steps ended without an update") as said:
        loop.run(3 * MOST_SKIPPED)
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    assert tuner.num_steps == 0


def test_of_sharded_gradients_nothing_is_concluded() -> None:
    """A rank may hold nothing of a tensor, and gradients that are not synchronised yet are elsewhere."""
    tuner = SparseTuner(tiny_lora(2), selector="all")
    view = SimpleNamespace(layers=tuner._view.layers, sharded=True)
    skipped = SkippedSteps(view, Boundary([]))  # pyright: ignore[reportArgumentType]
    for step in range(2 * MOST_SKIPPED):
        skipped.begin((0, 1), step)


@pytest.mark.parametrize("way", ["begin_step", "step"])
def test_accumulation_and_a_few_skipped_steps_are_nothing_to_tell(way: str) -> None:
    tuner = SparseTuner(tiny_lora(2), selector="all")
    Loop(tuner, way, micro=2 * MOST_SKIPPED).run(2, skips=False)
    assert tuner.num_steps == 2
    loop = Loop(tuner, way)
    for _ in range(3):
        loop.run(MOST_SKIPPED // 2)
        loop.run(1, skips=False)
    assert tuner.num_steps == 5


def test_accelerates_optimizer_says_so_and_the_loop_stops() -> None:
    model = tiny_lora(2)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler()
    optimizer = accelerator.prepare(torch.optim.SGD(trainable(model), lr=1e-3))
    tuner = SparseTuner(model, selector="all")
    done = []

    def loop() -> None:
        for batch in cycle(tiny_batches(2)):
            with tuner.step(optimizer):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            done.append(batch)

    with pytest.raises(NotFiniteError, match=STOPPED):
        loop()
    assert len(done) == MOST_SKIPPED


CALLBACKS = {
    "IST": lambda: IST(update_interval=20),
    "focused": lambda: IST(selector="all"),
    "none": FiniteWeightsCallback,
}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_trainer_stops(name: str, optim: str, tmp_path: Path) -> None:
    """A GradScaler leaves skipping to optimizers that are fused, as transformers' default is."""
    model = tiny_lora()
    for parameter in trainable(model):
        parameter.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    trainer = make_trainer(
        tmp_path, CALLBACKS[name](), model=model, save_strategy="no", max_steps=2 * MOST_SKIPPED, optim=optim
    )
    trainer.accelerator.scaler = scaler()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        with pytest.raises(SkippedError, match=rf"NaN or infinite in the last {MOST_SKIPPED} steps") as caught:
            trainer.train()
    assert "They were not saved" not in str(caught.value), "the weights are good"
    assert trainer.state.global_step == MOST_SKIPPED


def test_a_trainer_does_not_stop_where_steps_are_made_between(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, FiniteWeightsCallback(), save_strategy="no", max_steps=MOST_SKIPPED + 5)
    trainer.accelerator.scaler = scaler(skips=False)
    trainer.train()
    assert trainer.state.global_step == MOST_SKIPPED + 5


def with_nan(model: Any) -> str:
    """The name of a trained tensor, of which one number is NaN now."""
    name, parameter = [(n, p) for n, p in model.named_parameters() if p.requires_grad][5]
    with torch.no_grad():
        parameter.view(-1)[3] = NAN
    return name


@pytest.mark.parametrize("selector", ["ist", "all"])
def test_a_loop_with_a_weight_that_is_nan_from_the_start_does_not_begin(selector: str) -> None:
    model = tiny_lora()
    name = with_nan(model)
    tuner = SparseTuner(model, selector=selector, probe_batches=tiny_batches(1))
    with pytest.raises(NotFiniteError) as caught, tuner.step(torch.optim.SGD(trainable(model), lr=1e-3)):
        raise AssertionError
    assert str(caught.value).startswith(
        f"The trained weights are NaN or infinite from the start, before step 1 (1 of 32 tensors, {name} first): load "
    )
    assert tuner.active_layers is None


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_trainer_with_a_weight_that_is_nan_from_the_start_does_not_begin(name: str, tmp_path: Path) -> None:
    model = tiny_lora()
    tensor = with_nan(model)
    trainer = make_trainer(tmp_path, CALLBACKS[name](), model=model)
    with pytest.raises(NotFiniteError) as caught:
        trainer.train()
    assert f"from the start, before step 1 (1 of 32 tensors, {tensor} first)" in str(caught.value)
    assert trainer.state.global_step == 0
    assert "They were not saved" not in str(caught.value)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_run_that_resumes_with_a_weight_that_is_nan_says_that_the_checkpoint_holds_it(
    name: str, tmp_path: Path
) -> None:
    make_trainer(tmp_path, CALLBACKS[name]()).train()
    checkpoint = tmp_path / "checkpoint-3"
    file = checkpoint / "adapter_model.safetensors"
    weights = load_file(file)
    tensor = sorted(weights)[5]
    weights[tensor].view(-1)[3] = NAN
    save_file(weights, file, metadata={"format": "pt"})
    if (checkpoint / MANIFEST_FILE).exists():
        write_manifest(checkpoint)
    trainer = make_trainer(tmp_path, CALLBACKS[name]())
    with pytest.raises(BrokenStartError) as caught:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    layer = re.sub(r"\.weight$", ".default.weight", tensor)
    assert str(caught.value) == (
        f"The trained weights are NaN or infinite where this run resumes, before step 4 (1 of 32 tensors, {layer} "
        "first): the checkpoint that it resumes from holds them. Resume from an earlier one, or train anew."
    )
    assert trainer.state.global_step == 3


def test_a_loop_that_resumes_with_a_weight_that_is_nan() -> None:
    model = tiny_lora()
    tuner = SparseTuner(model, selector="all")
    tuner.num_steps = 7
    with_nan(model)
    with pytest.raises(BrokenStartError, match=r"where this run resumes, before step 8 \(1 of 32 tensors, "):
        tuner.check_weights()


class Own:
    """An optimizer that is not of PyTorch's kind."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.param_groups = [{"params": parameters, "lr": 1e-3}]

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.data -= 1e-3 * parameter.grad

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None


class Slots(Own):
    """One with nothing but its groups."""

    __slots__ = ("param_groups",)


class Both(Own):
    """Two of PyTorch's kind behind one."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters)
        self.optimizers = [torch.optim.SGD(parameters[part::2], lr=1e-3) for part in range(2)]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class Passes:
    """Its class has no `step`."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.inner = torch.optim.SGD(parameters, lr=1e-3)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Hooked(torch.optim.SGD):
    """One of PyTorch's kind."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, lr=1e-3)


MADE = (True, False, False, True, False, True, True)
"""Which steps a loop makes, and which it skips by hand."""


@pytest.mark.parametrize("given", ["before", "at every end", "never"])
@pytest.mark.parametrize("kind", [Hooked, Own, Slots, Both])
@pytest.mark.parametrize("clears", [True, False])
def test_steps_that_a_loop_skips_by_hand_do_not_count(kind: Any, given: str, clears: bool) -> None:
    """Of any optimizer that was given, if it has hooks or has stepped since; where none was, after the first step that
    one with hooks has made.
    """
    if given == "never" and kind in (Own, Slots):
        pytest.skip("nothing shows the steps of an optimizer without hooks that was not given")
    gc.collect()  # The tuners of other tests listen to the class.
    model = tiny_lora(4)
    optimizer, chosen, counts = kind(trainable(model)), [], []
    steps = (True, *MADE) if given == "at every end" and kind is not Hooked else MADE
    with SparseTuner(model, selector="random", num_active_layers=1) as tuner:
        if given == "before":
            tuner.attach_optimizer(optimizer)
        for made, batch in zip(steps, cycle(tiny_batches(2, size=1)), strict=False):
            chosen.append(tuner.begin_step())
            model(**batch).loss.backward()
            if made:
                optimizer.step()
            if made or clears:
                optimizer.zero_grad()
            tuner.end_step(optimizer if given == "at every end" else None)
            counts.append(tuner.num_steps)
    assert counts == list(itertools.accumulate(steps))
    continued = [(before, after) for made, before, after in zip(steps, chosen, chosen[1:], strict=False) if not made]
    assert len(continued) == 3
    assert all(before == after for before, after in continued), "a step that was skipped continues with its layers"
    assert not hasattr(kind.step, TELLS), "its class is let alone"


@pytest.mark.parametrize("kind", [Own, Slots, Both])
def test_under_a_scaler_too(kind: Any) -> None:
    tuner = SparseTuner(tiny_lora(2), selector="all")
    loop = Loop(tuner, "begin_step")
    loop.optimizer = kind(trainable(tuner.model))
    loop.run(3)
    assert tuner.num_steps == 0
    loop.optimizer.zero_grad()
    loop.run(2, skips=False)
    assert tuner.num_steps == 2


def bound_before(optimizer: Any) -> Callable[[], None]:
    """As `torch.compile(optimizer.step)` before the tuner is made."""
    return optimizer.step


def other_method(optimizer: Any) -> Callable[[], None]:
    """An update that is no `step`, as SAM's two are."""
    return partial(Own.__dict__["step"], optimizer)


@pytest.mark.parametrize("kind", [Own, Both])
@pytest.mark.parametrize("update", [bound_before, other_method])
def test_an_optimizer_that_steps_in_a_way_that_nothing_shows_moves_on(kind: Any, update: Any) -> None:
    """It was taken for one whose every step is skipped, and the same layers trained for ever."""
    gc.collect()
    model = tiny_lora(4)
    optimizer, chosen = kind(trainable(model)), []
    step = update(optimizer)
    with SparseTuner(model, selector="random", num_active_layers=1) as tuner:
        tuner.attach_optimizer(optimizer)
        for batch in itertools.islice(cycle(tiny_batches(2, size=1)), 8):
            chosen.append(tuner.begin_step())
            model(**batch).loss.backward()
            step()
            optimizer.zero_grad()
            tuner.end_step(optimizer)
        assert tuner.num_steps == 8
    assert len(set(chosen)) > 1


def test_an_optimizer_whose_groups_hold_copies_moves_on() -> None:
    """Such as weights in float32, of which it writes to the model's own."""
    model = tiny_lora(2)
    optimizer = Own([torch.nn.Parameter(parameter.detach().clone()) for parameter in trainable(model)])
    with SparseTuner(model, selector="all") as tuner:
        with pytest.warns(UserWarning, match="optimizer"):
            tuner.attach_optimizer(optimizer)
        for _ in range(3):
            tuner.begin_step()
            optimizer.step()
            tuner.end_step(optimizer)
        assert tuner.num_steps == 3


def test_what_nothing_shows_counts() -> None:
    """Before the optimizer has stepped; where a `step` is the object's own, or passed on to one without hooks, or its
    class cannot be changed.
    """

    class Closed(type):
        def __setattr__(cls, name: str, value: Any) -> None:
            raise AttributeError(f"{name} is read-only")

    class Sealed(Own, metaclass=Closed):
        def step(self) -> None:
            super().step()

    model = tiny_lora(2)
    for kind in (Own, Passes, Sealed):
        optimizer = kind(trainable(model))
        if kind is Own:
            vars(optimizer)["step"] = optimizer.step
        with SparseTuner(model, selector="all") as tuner:
            for _ in range(2):
                tuner.begin_step()
                tuner.end_step(optimizer)
            assert tuner.num_steps == 2
    with SparseTuner(model, selector="all") as tuner:
        for num_steps, made in ((1, False), (2, False), (3, True), (3, False)):
            optimizer = Own(trainable(model))
            tuner.attach_optimizer(optimizer)
            tuner.begin_step()
            if made:
                optimizer.step()
            tuner.end_step(optimizer)
            assert tuner.num_steps == num_steps


def test_an_optimizer_without_hooks_steps_as_before_and_is_left_alone() -> None:
    class Fresh(Own):
        """Nobody else listens to it."""

        def step(self, closure: Any = None) -> Any:
            return closure()

    plain, model = Fresh.step, tiny_lora(2)
    first, second = SparseTuner(model, selector="all"), SparseTuner(tiny_lora(2), selector="all")
    for tuner in (first, second):
        tuner.attach_optimizer(Fresh(trainable(tuner.model)))
    assert Fresh.step is not plain
    assert Fresh(trainable(model)).step(closure=lambda: 5.0) == 5.0
    assert [tuner._parts.boundary.num_outcomes for tuner in (first, second)] == [1, 0]
    first.close()
    assert Fresh.step is not plain
    second.close()
    assert Fresh.step is plain
