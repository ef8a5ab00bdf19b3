"""A Trainer and its `IST`: whatever ends a training, the next one trains every layer; no step too many is trained."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from ist import IST, read_history
from ist.integrations.attachment import check_backend_of, forget_evaluation
from tests.helpers.tiny import layer_of, moved_layers, snapshot, tiny_batches, tiny_lora, tiny_rows, traces, trainable

EVERY_LAYER = {0, 1, 2, 3}


def make(model: Any, folder: Path, *callbacks: TrainerCallback, kind: type[Trainer] = Trainer, **options: Any) -> Any:
    settings: dict[str, Any] = {"max_steps": 6, "save_strategy": "no", "report_to": [], "disable_tqdm": True, **options}
    args = TrainingArguments(str(folder), learning_rate=1e-2, use_cpu=True, **settings)
    return kind(model=model, args=args, train_dataset=tiny_rows(64), callbacks=list(callbacks))  # type: ignore[arg-type]


# ---- Whatever ends a training


class End(TrainerCallback):
    """Ends a training with an exception in one of the Trainer's events, in the third step."""

    def __init__(self, event: str, error: BaseException) -> None:
        def end(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= 2:
                raise error

        setattr(self, event, end)


class EndInAdapter:
    """Ends a training within the forward of the adapter of each layer's first module."""

    def __init__(self, model: nn.Module, error: BaseException) -> None:
        self._num = 0
        self._error = error
        self.handles = [
            module.register_forward_hook(self._end) for name, module in model.named_modules() if name.endswith("lora_A")
            for module in module.modules() if isinstance(module, nn.Linear)
        ]  # fmt: skip

    def _end(self, *_: Any) -> None:
        self._num += 1
        if self._num == 30:
            for handle in self.handles:
                handle.remove()
            raise self._error


def train_plainly(model: Any) -> set[int | None]:
    """The layers that a loop without IST moves in one step."""
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    before = snapshot(model)
    for batch in tiny_batches(2):  # The first step moves B alone.
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return moved_layers(before, snapshot(model))


def train_with_the_trainer(model: Any, folder: Path) -> set[int | None]:
    before = snapshot(model)
    make(model, folder, max_steps=2).train()
    return moved_layers(before, snapshot(model))


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["fused", "not fused"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("as planned")], ids=repr)
@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_log", "a forward"])
def test_the_next_training_without_ist_is_one_without_ist(
    tmp_path: Path, event: str, error: BaseException, lora: dict[str, Any]
) -> None:
    """Also where the former Trainer, its callback and the traceback are all kept."""
    model = tiny_lora(**lora)
    before = traces(model)
    callback = IST(num_active_layers=1)
    if event == "a forward":
        EndInAdapter(model, error)
    cut_off = make(
        model, tmp_path, callback, End(event, error), gradient_accumulation_steps=2, logging_steps=1
    )  # fmt: skip
    with pytest.raises(type(error)) as kept:
        cut_off.train()
    assert callback.tuner
    assert callback.tuner.closed
    after = traces(model)
    assert after == before, [name for name in before if after[name] != before[name]]
    assert not [name for module in model.modules() for name in vars(module) if name.startswith("_ist")]
    assert train_plainly(model) == EVERY_LAYER
    assert train_with_the_trainer(model, tmp_path / "next") == EVERY_LAYER
    assert kept.tb is not None
    assert cut_off.model is model, "all of it is still there"


def test_another_trainer_of_the_same_callback_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    def trainer(*callbacks: TrainerCallback) -> Any:
        torch.manual_seed(1)
        return make(tiny_lora(), tmp_path, *callbacks, save_strategy="steps", save_steps=2)

    cut_off = trainer(IST(update_interval=2), End("on_step_begin", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        cut_off.train()
    trainer(IST(update_interval=2)).train(resume_from_checkpoint=True)
    assert [event["step"] for event in read_history(tmp_path) if event["event"] == "step"] == [1, 2, 3, 4, 5, 6]


# ---- Reporters, with and without `attach`


class Reporter(TrainerCallback):
    """Keeps what it is told at the moment when it is told, as a service would."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


class OwnTrain(Trainer):
    """Trains without `Trainer.train`."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner_training_loop(batch_size=8, args=self.args)


@pytest.mark.parametrize(
    ("kind", "attach", "told"), [(Trainer, False, True), (OwnTrain, True, True), (OwnTrain, False, False)]
)
def test_who_is_told_what_was_chosen(tmp_path: Path, kind: type[Trainer], attach: bool, told: bool) -> None:
    reporter, callback = Reporter(), IST(update_interval=2)
    trainer = make(tiny_lora(), tmp_path, reporter, callback, kind=kind, logging_steps=2)
    if attach:
        assert callback.attach(trainer) is callback
    trainer.train()
    losses = [logs for logs in reporter.seen if "loss" in logs]
    assert len(losses) == 3
    assert all(("ist/num_steps" in logs) == told for logs in losses)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["ist/num_steps"] for entry in log] == [2, 4, 6], "the log has it in any case"


def test_attach_adds_the_callback_and_refuses_what_is_no_trainer(tmp_path: Path) -> None:
    trainer = make(tiny_lora(), tmp_path)
    callback = IST(update_interval=2).attach(trainer)
    assert trainer.callback_handler.callbacks.count(callback) == 1
    assert callback.attach(trainer) is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1
    with pytest.raises(ValueError, match="has 2 IST callbacks"):
        IST().attach(trainer)
    with pytest.raises(ValueError, match="has no callbacks: give a Trainer"):
        IST().attach(tiny_lora())


def test_a_trainer_without_ist_trains_within_one_that_has_it(tmp_path: Path) -> None:
    """Such as a callback that trains a model to judge by; each callback knows its own Trainer."""
    inner = make(tiny_lora(), tmp_path / "inner", IST(seed=2), max_steps=2)

    class TrainAnother(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                inner.train()

    callback = IST(num_active_layers=1)
    trainer = make(tiny_lora(), tmp_path / "outer", callback, TrainAnother())
    trainer.train()
    for folder, length in (("outer", 6), ("inner", 2)):
        steps = [event for event in read_history(tmp_path / folder) if event["event"] == "step"]
        assert [event["step"] for event in steps] == list(range(1, length + 1))


def test_no_stack_and_no_garbage_collector_is_searched() -> None:
    source = Path(sys.modules["ist"].__file__ or "").parent
    for file in source.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for way in ("currentframe", "_getframe", "inspect.stack", "f_back", "gc.get_", "tb_frame"):
            assert way not in text, f"{file.relative_to(source)} uses {way}"


# ---- No step too many


@pytest.mark.parametrize("save_steps", [6, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_that_is_resumed_at_its_end_trains_no_more(tmp_path: Path, save_steps: int, accumulation: int) -> None:
    """Killed after its last checkpoint, and with the number of steps of an earlier one."""

    def trainer(*callbacks: TrainerCallback) -> Any:
        torch.manual_seed(1)
        return make(
            tiny_lora(lora_dropout=0.1), tmp_path, IST(update_interval=2, mu=100.0), *callbacks,
            save_strategy="steps", save_steps=save_steps, gradient_accumulation_steps=accumulation,
        )  # fmt: skip

    whole = trainer()
    whole.train()
    expected, drawn = snapshot(whole.model), torch.rand(4)
    resumed = trainer()
    output = resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert torch.equal(torch.rand(4), drawn), "what is drawn after the training is another"
    assert output.global_step == resumed.state.global_step == 6
    found = snapshot(resumed.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [event["step"] for event in read_history(tmp_path) if event["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert "_run_epoch" not in vars(resumed)


def test_a_run_that_is_longer_than_its_new_end_trains_no_more(tmp_path: Path) -> None:
    make(tiny_lora(), tmp_path, IST(update_interval=2), save_strategy="steps", save_steps=4).train()
    resumed = make(tiny_lora(), tmp_path, IST(update_interval=2), max_steps=3)
    with pytest.warns(UserWarning, match="began with other arguments"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 4
    saved = TrainerState.load_from_json(str(tmp_path / "checkpoint-4" / "trainer_state.json"))
    assert saved.global_step == 4


def test_no_steps_are_no_steps(tmp_path: Path) -> None:
    model = tiny_lora()
    before = snapshot(model)
    trainer = make(model, tmp_path, IST(), max_steps=0)
    assert trainer.train().global_step == 0
    after = snapshot(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [event["event"] for event in read_history(tmp_path)].count("step") == 0
    trainer.args.max_steps = 2
    assert trainer.train().global_step == 2, "and the Trainer trains again"
    assert {layer_of(name) for name, p in model.named_parameters() if p.requires_grad} == EVERY_LAYER


# ---- The backend that the launcher asked for


class Launched:
    """What a Trainer of several processes knows of its model."""

    def __init__(self, backend: str, model: Any) -> None:
        self.model = self.model_wrapped = model
        self.accelerator = SimpleNamespace(distributed_type=backend, num_processes=2, _models=[model])


@pytest.mark.parametrize(
    ("backend", "message"),
    [("MULTI_CPU", "wrapped in DistributedDataParallel, and it is not wrapped"), ("MULTI_GPU", "DistributedData"),
     ("FSDP", r"fully sharded \(FSDP\), and it is not sharded"), ("NO", None)],
)  # fmt: skip
def test_a_model_that_is_not_wrapped_as_the_launcher_asked_is_refused(backend: str, message: str | None) -> None:
    trainer = Launched(backend, tiny_lora())
    if message is None:
        return check_backend_of(trainer)
    with pytest.raises(ValueError, match=message) as caught:
        check_backend_of(trainer)
    assert "\n" not in str(caught.value)
    return None


def test_an_evaluation_is_forgotten_where_several_processes_train() -> None:
    for backend, kept in (("MULTI_CPU", False), ("NO", True), ("FSDP", True)):
        trainer = Launched(backend, tiny_lora())
        trainer.model._is_accelerate_prepared = True
        forget_evaluation(trainer)
        assert hasattr(trainer.model, "_is_accelerate_prepared") == kept
        assert bool(trainer.accelerator._models) == kept
