"""A training whose weights become NaN or infinite stops in its midst with one line, and nothing of it is saved."""

from __future__ import annotations

import itertools
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.optim.optimizer as optimizers
from torch import nn
from transformers import Trainer, TrainerCallback

from ist import IST, SparseTuner, last_checkpoint
from ist.integrations.finite import FiniteWeightsCallback
from ist.step.finite import CHECK_INTERVAL, NotFiniteError, all_finite
from ist.step.scaling import listeners
from tests.helpers.tiny import cycle, tiny_batches, tiny_lora, traces, trainable
from tests.helpers.trainers import make_trainer

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0, NAN, INF, -INF])
def test_every_number_counts(value: float, dtype: torch.dtype) -> None:
    tensors = [torch.zeros(0), torch.full((3, 5), 6e4, dtype=dtype), torch.tensor([0.0, value], dtype=dtype)]
    assert all_finite(tensors) == (value == 1.0)


def diverge(model: Any, tuner: SparseTuner, steps: int, learning_rate: float = 1e30) -> None:
    optimizer = torch.optim.SGD(trainable(model), lr=learning_rate)
    for batch in itertools.islice(cycle(tiny_batches(2)), steps):
        tuner.begin_step()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tuner.end_step(optimizer)


@pytest.mark.parametrize(
    ("options", "step"),
    [({"selector": "all"}, CHECK_INTERVAL), ({"selector": "random"}, CHECK_INTERVAL), ({"update_interval": 3}, 3),
     ({"update_interval": 3, "fused": False}, 3)],
)  # fmt: skip
def test_a_loop_stops_where_it_is_looked_at(options: dict[str, Any], step: int) -> None:
    model = tiny_lora()
    before = traces(model)
    with pytest.raises(NotFiniteError) as caught, SparseTuner(model, probe_batches=tiny_batches(2), **options) as tuner:
        diverge(model, tuner, 2 * CHECK_INTERVAL)
    said = str(caught.value)
    assert re.match(
        rf"The trained weights are NaN or infinite after step {step} \(\d+ of 32 tensors, base_model\S+lora_\S+ first; "
        r"they were finite at the start\)"
        r"\. Give a lower learning rate",
        said,
    ), said
    assert "\n" not in said
    assert tuner.num_steps == step
    assert traces(model) == before


def test_a_loop_in_blocks_stops_and_says_when_the_weights_were_finite() -> None:
    model = tiny_lora()
    tuner = SparseTuner(model, selector="all")
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)

    def train() -> None:
        for number, batch in enumerate(itertools.islice(cycle(tiny_batches(2)), 40)):
            with tuner.step(optimizer):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if number == 12:
                optimizer.param_groups[0]["lr"] = 1e30

    with pytest.raises(NotFiniteError, match=r"after step 20 .*finite after step 10\)"):
        train()


def test_steps_that_a_grad_scaler_skips_stop_nothing() -> None:
    """Their gradients are infinite, and the weights are as they were."""
    model = tiny_lora()
    tuner = SparseTuner(model, selector="all")
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, growth_interval=1000)
    for batch in itertools.islice(cycle(tiny_batches(2)), 150):
        with tuner.step(optimizer):
            scaler.scale(model(**batch).loss * 1e4).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert scaler.get_scale() < 1e38
    assert 0 < tuner.num_steps < 150
    assert all_finite(model.parameters())


def test_a_weight_that_trains_outside_of_the_layers_counts() -> None:
    model = tiny_lora(modules_to_save=["lm_head"])
    tuner = SparseTuner(model, selector="all")
    head = next(p for name, p in model.named_parameters() if "modules_to_save" in name)
    tuner.check_weights()
    nn.init.constant_(head, NAN)
    tuner.num_steps = 1
    with pytest.raises(NotFiniteError, match=r"1 of 33 tensors, .*lm_head\.modules_to_save"):
        tuner.check_weights()


class WithoutIST(Trainer):
    """What `ist train` does for methods without the callback."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        (watch,) = (c for c in self.callback_handler.callbacks if isinstance(c, FiniteWeightsCallback))
        with watch.watching(self):
            return super().train(*args, **kwargs)


def too_fast_after(step: int) -> Any:
    """Sets the learning rate of the steps after `step` to what no weight survives."""

    class Raise(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            if state.global_step >= step:
                for group in optimizer.param_groups:
                    group["lr"] = 1e38

    return Raise()


CALLBACKS = {
    "IST": lambda: IST(update_interval=20),
    "focused": lambda: IST(selector="all"),
    "none": FiniteWeightsCallback,
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_trainer_stops_before_it_saves_and_names_the_last_checkpoint(name: str, tmp_path: Path) -> None:
    model = tiny_lora()
    before = traces(model)
    trainer = make_trainer(
        tmp_path, CALLBACKS[name](), too_fast_after(4), model=model, save_total_limit=1, max_grad_norm=0.0, optim="sgd"
    )
    if name == "none":
        trainer.__class__ = WithoutIST
    with pytest.raises(NotFiniteError) as caught:
        trainer.train()
    assert trainer.state.global_step == 6
    assert re.search(r"after step 6 \(.*finite after step 3\)\. Give .* They were not saved: ", str(caught.value))
    assert str(caught.value).endswith(f"the last good checkpoint is {tmp_path / 'checkpoint-3'}.")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert not (tmp_path / "checkpoint-6").exists()
    assert traces(model) == before
    assert "_save_checkpoint" not in vars(trainer)


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize(
    ("options", "step"), [({"logging_steps": 2}, 2), ({"max_steps": 7}, 7), ({"max_steps": 30}, CHECK_INTERVAL)]
)
def test_a_trainer_stops_at_a_log_at_its_end_or_from_time_to_time(
    name: str, options: dict[str, Any], step: int, tmp_path: Path
) -> None:
    trainer = make_trainer(
        tmp_path, CALLBACKS[name](), save_strategy="no", learning_rate=1e38, lr_scheduler_type="constant",
        max_grad_norm=0.0, optim="sgd", **options,
    )  # fmt: skip
    if name == "none":
        trainer.__class__ = WithoutIST
    with pytest.raises(NotFiniteError, match=r"They were not saved\.$"):
        trainer.train()
    assert trainer.state.global_step == step


class Interrupted(TrainerCallback):
    """Ends a training in its second step, or after it."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.how in ("an error", "Ctrl-C") and state.global_step == 2:
            raise KeyboardInterrupt if self.how == "Ctrl-C" else OSError


def hooks_of(optimizer: Any) -> list[int]:
    """How many hooks are on an optimizer, and on all optimizers."""
    own = getattr(optimizer, "optimizer", optimizer)
    kinds = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_optimizer_state_dict_pre_hooks")
    everywhere = (optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks)
    return [*(len(getattr(own, kind)) for kind in kinds), *map(len, everywhere)]


@pytest.mark.parametrize("how", ["regularly", "an error", "Ctrl-C", "NaN"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_nothing_stays_on_optimizers_or_the_model_after_any_end(name: str, how: str, tmp_path: Path) -> None:
    """The Trainer lives on, as a traceback keeps it."""
    model = tiny_lora()
    before, hooks = traces(model), hooks_of(torch.optim.SGD(trainable(model)))
    options: dict[str, Any] = {"learning_rate": 1e38, "max_grad_norm": 0.0, "optim": "sgd"} if how == "NaN" else {}
    trainer = make_trainer(tmp_path, CALLBACKS[name](), Interrupted(how), model=model, max_steps=4, **options)
    if name == "none":
        trainer.__class__ = WithoutIST
    listening = len(listeners)
    with suppress(KeyboardInterrupt, OSError, NotFiniteError):
        trainer.train()
    assert trainer.state.global_step == (4 if how == "regularly" else 3 if how == "NaN" else 2)
    assert hooks_of(trainer.optimizer) == hooks
    assert len(listeners) == listening
    assert traces(model) == before
    assert "_save_checkpoint" not in vars(trainer)
