"""A model that an earlier tuner still watches, tuners that are closed, and steps that are begun or ended alone."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from ist import IST, SparseTuner, read_history
from tests.helpers.tiny import layer_of, moved_layers, snapshot, tiny_batches, tiny_lora, tiny_rows, traces, trainable

BATCH = tiny_batches(1)[0]


class Spy(TrainerCallback):
    """The layers that each step moved, and an end in the middle of a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.moved: list[set[int | None]] = []
        self._stop_at = stop_at
        self._before: dict[str, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = snapshot(kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self._stop_at:
            raise KeyboardInterrupt

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.moved.append(moved_layers(self._before, snapshot(kwargs["model"])))


def trainer(model: Any, folder: Path, callbacks: list[Any], max_steps: int = 6) -> Trainer:
    args = TrainingArguments(
        str(folder), max_steps=max_steps, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no"
    )
    return Trainer(model=model, args=args, train_dataset=tiny_rows(64), callbacks=callbacks)  # type: ignore[arg-type]


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_a_training_after_one_that_was_cut_off_moves_its_own_layers(tmp_path: Path, lora: dict[str, Any]) -> None:
    model = tiny_lora(**lora)
    cut_off = trainer(model, tmp_path / "a", [IST(num_active_layers=1), Spy(stop_at=2)])
    with pytest.raises(KeyboardInterrupt):
        cut_off.train()
    spy = Spy()
    trainer(model, tmp_path / "b", [IST(num_active_layers=1, seed=9), spy]).train()
    chosen = [set(event["active"]) for event in read_history(tmp_path / "b") if event["event"] == "step"]
    assert spy.moved == chosen
    assert len(set(map(tuple, chosen))) > 1
    assert cut_off.model is model, "and is still there"


def test_a_tuner_ends_an_open_one_of_the_same_layers() -> None:
    model = tiny_lora()
    before = traces(model)
    first = SparseTuner(model, selector="fixed:0", probe_batches=[BATCH])
    first.begin_step()
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    with SparseTuner(model, selector="fixed:3", probe_batches=[BATCH]) as second:
        assert first.closed
        assert not second.closed
        second.begin_step()
        model(**BATCH).loss.backward()
        weights = snapshot(model)
        optimizer.step()
        assert moved_layers(weights, snapshot(model)) == {3}
        first.close()
        assert {layer_of(name) for name, p in model.named_parameters() if p.grad is not None} == {3}
    assert traces(model) == before


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    model = tiny_lora()
    before = traces(model)
    with pytest.raises(ValueError, match="has 2 IST callbacks"):
        trainer(model, tmp_path, [IST(), IST(seed=5)]).train()
    assert traces(model) == before


def test_a_closed_tuner_takes_no_steps() -> None:
    tuner = SparseTuner(tiny_lora(), probe_batches=[BATCH])
    tuner.close()
    for step in (tuner.begin_step, tuner.end_step):
        with pytest.raises(ValueError, match="make another SparseTuner"):
            step()
    assert tuner.state_dict()["num_steps"] == 0


def test_steps_that_never_end_are_said_once() -> None:
    with SparseTuner(tiny_lora(), probe_batches=[BATCH]) as tuner:
        for _ in range(3):  # A loop may skip a step.
            tuner.begin_step()
        tuner.end_step()
        for _ in range(9):
            tuner.begin_step()
        with pytest.warns(UserWarning, match="begin_step was called 10 times and end_step never"):
            tuner.begin_step()
        for _ in range(20):
            tuner.begin_step()


@pytest.mark.parametrize("options", [{}, {"fused": False}], ids=["fused", "by hooks"])
@pytest.mark.parametrize("how", ["deepcopy", "saved whole"])
def test_a_copy_of_a_model_in_the_middle_of_a_step_trains_every_layer(how: str, options: dict[str, Any]) -> None:
    model = tiny_lora()
    with SparseTuner(model, selector="fixed:1", probe_batches=[BATCH], **options) as tuner:
        tuner.begin_step()
        if how == "deepcopy":
            copied = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            copied = torch.load(file, weights_only=False)
        copied(**BATCH).loss.backward()
        model(**BATCH).loss.backward()
    trained = {layer_of(name) for name, p in copied.named_parameters() if p.grad is not None}
    assert trained == {0, 1, 2, 3}
    assert {layer_of(name) for name, p in model.named_parameters() if p.grad is not None} == {1}


def test_a_training_that_ends_before_anything_is_learned_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for steps, said in ((3, True), (10, False)):
        caplog.clear()
        trainer(tiny_lora(), tmp_path, [IST()], max_steps=steps).train()
        assert ("chosen at random throughout" in caplog.text) is said
