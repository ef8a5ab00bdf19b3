"""Arguments of a wrong kind, told at once and in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from ist import IST, SparseTuner, read_history
from tests.helpers.tiny import tiny_lora, tiny_rows, traces


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"selector": None}, "selector=None chooses nothing: give one of 'ist'"),
        ({"selector": 3}, "or a function"),
        ({"loss_function": "ce"}, "loss_function='ce' is no function"),
        ({"probe_dataset": "train"}, "probe_dataset is a str"),
        ({"probe_dataset": 3}, "probe_dataset is a int"),
    ],
)
def test_the_callback_says_it_before_training(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        IST(**options)


def test_a_name_is_no_model() -> None:
    model: Any = "tiny"
    with pytest.raises(ValueError, match="model is a str: give a model"):
        SparseTuner(model)


def test_a_word_is_no_loss_function() -> None:
    with pytest.raises(ValueError, match="loss_function='ce' is no function"):
        SparseTuner(tiny_lora(), loss_function="ce")  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", ["adamw", torch.optim.AdamW, torch.ones(2), {"params": []}], ids=str)
def test_what_is_no_optimizer(optimizer: Any) -> None:
    tuner = SparseTuner(tiny_lora())
    with pytest.raises(ValueError, match="has no groups of parameters: give an optimizer"), tuner.step(optimizer):
        pytest.fail("a step began")
    assert tuner.active_layers is None
    tuner.close()


def test_adapters_that_are_switched_off_and_how_they_are_switched_on() -> None:
    model = tiny_lora()
    model.base_model.disable_adapter_layers()
    before = traces(model)
    with pytest.raises(ValueError, match=r"enable_adapter_layers\(\)"):
        SparseTuner(model)
    assert traces(model) == before
    model.base_model.enable_adapter_layers()
    SparseTuner(model).close()


def test_a_probe_dataset_may_have_columns_that_the_trainer_strips_off_the_training_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{name: value.tolist() for name, value in row.items()} for row in tiny_rows(16)]
    data = datasets.Dataset.from_list([{**row, "text": "a text"} for row in rows])
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no"
    )
    callback = IST(update_interval=1, probe_dataset=data)
    Trainer(model=tiny_lora(), args=args, train_dataset=data, callbacks=[callback]).train()
    updates = [event for event in read_history(tmp_path) if event["event"] == "importance"]
    assert len(updates) == 2
    assert all(event["skipped"] is None for event in updates)
    assert data.column_names == ["input_ids", "labels", "text"]
