"""Probe batches of every kind of loader and dataset: measured on, or told in one line before the training begins."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from ist import IST, SparseTuner, read_history
from ist.integrations.probe_data import columns_of
from tests.helpers.tiny import snapshot, tiny_batches, tiny_lora, tiny_rows, trainable

STEPS = 6


def train(
    folder: Path, callback: TrainerCallback, kind: type[Trainer] = Trainer, data: Any = None, model: Any = None
) -> Any:
    args = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    rows: Any = data or tiny_rows(48)
    trainer = kind(model=model or tiny_lora(), args=args, train_dataset=rows, callbacks=[callback])
    trainer.train()
    return trainer


def updates(folder: Path) -> list[int]:
    return [event["step"] for event in read_history(folder) if event["event"] == "importance"]


# ---- Loaders and samplers of one's own


class Batches:
    """A loader without a dataset, a sampler or a collator."""

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[Any]:
        return iter(tiny_batches(12))


class OwnLoader(Trainer):
    def get_train_dataloader(self) -> Any:
        return Batches()


class Keyed(Dataset[Any]):
    """Rows by name."""

    def __init__(self) -> None:
        self.rows = {f"row {number}": row for number, row in enumerate(tiny_rows(48))}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        return self.rows[key]


class Keys(Sampler[str]):
    def __len__(self) -> int:
        return 48

    def __iter__(self) -> Iterator[str]:
        return iter(f"row {number}" for number in range(48))


class OwnSampler(Trainer):
    def get_train_dataloader(self) -> Any:
        return DataLoader(self.train_dataset, batch_size=4, sampler=Keys())  # type: ignore[arg-type]


def test_a_loader_without_a_dataset_is_measured_on_its_last_batch(tmp_path: Path) -> None:
    train(tmp_path, IST(update_interval=2), OwnLoader)
    assert updates(tmp_path) == [2, 4, 6]


def test_a_loader_without_a_collator_measures_on_a_probe_dataset(tmp_path: Path) -> None:
    train(tmp_path, IST(update_interval=2, probe_dataset=tiny_rows(8, seed=5)), OwnLoader)
    assert updates(tmp_path) == [2, 4, 6]


def test_a_sampler_with_keys_of_its_own_is_said_and_measured_on_the_last_batch(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"No probe batch can be drawn from the training set \(KeyError") as said:
        train(tmp_path, IST(update_interval=2), OwnSampler, Keyed())
    assert len([w for w in said if "probe batch" in str(w.message)]) == 1
    assert updates(tmp_path) == [2, 4, 6]


def test_where_nothing_is_measured_no_row_is_drawn(tmp_path: Path) -> None:
    class Read(Dataset[Any]):
        def __init__(self) -> None:
            self.rows, self.num_read = tiny_rows(48), 0

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> Any:
            self.num_read += 1
            return self.rows[index]

    counts = []
    for callback in (TrainerCallback(), IST(selector="random"), IST(update_interval=STEPS + 1)):
        data = Read()
        train(tmp_path, callback, data=data)
        counts.append(data.num_read)
    assert counts[1:] == counts[:1] * 2


# ---- Probe datasets


def test_raw_rows_are_refused_with_the_columns_that_they_lack(tmp_path: Path) -> None:
    rows = [{name: value.tolist() for name, value in row.items()} for row in tiny_rows(48)]
    raw = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}] * 8)
    model = tiny_lora()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"has the columns prompt, completion, and none .*\(input_ids, labels"
    ) as caught:
        train(tmp_path, IST(probe_dataset=raw), data=datasets.Dataset.from_list(rows).with_format("torch"), model=model)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in snapshot(model).items())


def test_raw_rows_in_a_list_are_refused_likewise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has the columns text, and none .*\(input_ids, labels\)"):
        train(tmp_path, IST(probe_dataset=[{"text": "a"}] * 8))


def transformed() -> Any:
    dataset = datasets.Dataset.from_list([{"text": "a"}])
    dataset.set_transform(lambda rows: {"input_ids": [[1]] * len(rows["text"])})
    return dataset


class WithFormat(list[Any]):
    """A user's dataset, whose `format` is another thing than that of a Dataset."""

    format = "csv"


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (datasets.Dataset.from_list([{"a": 1, "b": 2}]), ["a", "b"]),
        (transformed(), []),
        ([{"a": 1}], ["a"]),
        (WithFormat([{"a": 1}]), ["a"]),
        (SimpleNamespace(format="csv"), []),
        ([], []),
    ],
)
def test_columns_are_those_of_the_rows(dataset: Any, expected: list[str]) -> None:
    assert columns_of(dataset) == expected


def test_a_dict_of_rows_by_number_is_a_dataset() -> None:
    IST(probe_dataset={0: {"input_ids": [1]}, 1: {"input_ids": [2]}})


def test_several_datasets_are_refused_with_their_names() -> None:
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"a": 1}])})
    for given, said in ((splits, "DatasetDict of train"), ({"a": [], "b": []}, "dict of a, b"), ({}, "of nothing")):
        with pytest.raises(ValueError, match=said):
            IST(probe_dataset=given)


class Raises(Dataset[Any]):
    """Rows of which every second batch cannot be read, or a length that changes."""

    def __init__(self, error: BaseException | None, length: int = 8) -> None:
        self._rows, self._error, self._length = tiny_rows(8, seed=5), error, length
        self._num = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        self._num += 1
        if self._error is not None and self._num > 4:
            raise self._error
        return self._rows[index]


ERRORS = [KeyError("text"), ValueError("bad row"), TypeError("None"), IndexError(9), ZeroDivisionError(),
          StopIteration(), UnicodeDecodeError("utf-8", b"", 0, 1, "bad"), AssertionError()]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_probe_dataset_raises_costs_that_update_alone(tmp_path: Path, error: Exception) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = train(tmp_path / "a", IST(update_interval=2, probe_dataset=Raises(error)))
    assert len([w for w in said if "No probe batch could be read" in str(w.message)]) == 1
    assert updates(tmp_path / "a") == []
    plain = train(tmp_path / "b", IST(selector="random"))
    expected = snapshot(plain.model)
    assert all(torch.equal(value, expected[name]) for name, value in snapshot(trainer.model).items())


def test_a_probe_dataset_without_rows_is_said_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="There is no batch to measure") as said:
        train(tmp_path, IST(update_interval=2, probe_dataset=Raises(None, length=0)))
    assert len([w for w in said if "no batch" in str(w.message)]) == 1
    assert updates(tmp_path) == []


# ---- Losses that take things out of a batch, and batches that are no inputs


def popping_loss(model: Any, batch: Any) -> Tensor:
    labels = batch.pop("labels")
    return model(**batch, labels=labels).loss


def masking_loss(model: Any, batch: Any) -> Tensor:
    """Masks one more label at each call."""
    labels = batch["labels"]
    labels[labels == labels.max()] = -100
    return model(**batch).loss


def nested_loss(model: Any, batch: Any) -> Tensor:
    labels = batch["meta"][0].pop("labels")
    return model(input_ids=batch["input_ids"], labels=labels).loss


def nested(batch: Any) -> Any:
    return {"input_ids": batch["input_ids"], "meta": [{"labels": batch["labels"]}]}


@pytest.mark.parametrize("loss_function", [masking_loss, nested_loss])
def test_a_loss_that_changes_its_batch_deep_inside_leaves_the_next_call_and_the_data_alone(loss_function: Any) -> None:
    batch = tiny_batches(1)[0]
    probe = nested(batch) if loss_function is nested_loss else batch
    model = tiny_lora(init_lora_weights=False)
    with SparseTuner(model, probe_batches=[probe], loss_function=loss_function) as tuner:
        losses = tuner._measure([(0, 1), (2, 3), (0, 1)])
    assert losses is not None
    assert losses[0] == losses[2] != losses[1]
    assert torch.equal(batch["labels"], tiny_batches(1)[0]["labels"])


def test_every_candidate_has_a_batch_of_its_own() -> None:
    found = []
    for loss_function in (popping_loss, None):
        model = tiny_lora(init_lora_weights=False)
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        with SparseTuner(
            model, probe_batches=tiny_batches(1), update_interval=1, loss_function=loss_function, fused=False
        ) as tuner:
            tuner.begin_step()
            model(**tiny_batches(1)[0]).loss.backward()
            optimizer.step()
            update = tuner.end_step(optimizer)
            assert update
            found.append(update.losses)
    assert found[0] == found[1]
    assert len(set(found[0])) == 3


class Strict(nn.Module):
    """A model that takes no input that it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = tiny_lora()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return self.encoder(input_ids=input_ids, labels=labels)


class StepWeighted(Trainer):
    """Takes a column away in its step, where no one can bind it."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        inputs.pop("weight")
        return super().training_step(model, inputs, num_items_in_batch)


def test_batches_that_are_no_inputs_are_told_before_the_training(tmp_path: Path) -> None:
    rows = [{**row, "weight": 1.0} for row in tiny_rows(48)]
    model = Strict()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"input_ids, .*weight.* TypeError: .*'weight'.*loss_function=.*selector="
    ) as caught:
        train(tmp_path, IST(update_interval=2), StepWeighted, rows, model)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in snapshot(model).items())
    train(tmp_path, IST(selector="random"), StepWeighted, rows, model)
    train(tmp_path, IST(update_interval=STEPS + 1), StepWeighted, rows, model)


def test_the_trial_before_the_training_changes_no_bit_of_it(tmp_path: Path) -> None:
    """Nor the generators, nor the mode of a module."""
    states = []
    for callback in (IST(update_interval=STEPS, mu=0.0), IST(selector="random")):
        torch.manual_seed(5)
        trainer = train(tmp_path, callback, model=tiny_lora(lora_dropout=0.3))
        states.append((snapshot(trainer.model), [module.training for module in trainer.model.modules()]))
    assert states[0][1] == states[1][1]
    assert all(torch.equal(value, states[1][0][name]) for name, value in states[0][0].items())
