"""Streams, which are measured on the model's last inputs, beside losses that a Trainer computes of more than those."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from ist import IST
from tests.helpers.tiny import tiny_lora, tiny_rows, traces


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(tiny_rows(64))


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Own(Trainer):
    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any
    ) -> Any:
        labels = inputs.pop("labels")
        return own_loss(model(**inputs), labels)


def make(folder: Path, ist: IST, kind: Any = Trainer, smoothing: float = 0.0, **options: Any) -> Any:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, label_smoothing_factor=smoothing,
    )  # fmt: skip
    return kind(model=tiny_lora(), args=arguments, train_dataset=Stream(), callbacks=[ist], **options)


LOSSES: dict[str, dict[str, Any]] = {
    "label smoothing": {"smoothing": 0.1},
    "compute_loss_func": {"compute_loss_func": own_loss},
    "compute_loss": {"kind": Own},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_it_is_told_before_the_training_begins(loss: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, IST(update_interval=3, num_active_layers=2), **LOSSES[loss])
    before = traces(trainer.model)
    with pytest.raises(ValueError, match="give IST a probe_dataset with rows by index, or loss_function="):
        trainer.train()
    assert trainer.state.global_step == 0
    assert traces(trainer.model)["requires_grad"] == before["requires_grad"]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("ways", [{"selector": "random"}, {"probe_dataset": tiny_rows(8)}], ids=["random", "rows"])
def test_the_ways_out_train(ways: dict[str, Any], loss: str, tmp_path: Path) -> None:
    ist = IST(update_interval=3, num_active_layers=2, **ways)
    make(tmp_path, ist, **LOSSES[loss]).train()
    assert ist.tuner is not None
    assert (ist.tuner.last_update is not None) == ("probe_dataset" in ways)


def test_the_models_own_loss_is_measured_on_the_last_batch(tmp_path: Path) -> None:
    ist = IST(update_interval=3, num_active_layers=2)
    make(tmp_path, ist).train()
    assert ist.tuner is not None
    assert ist.tuner.last_update is not None
    assert ist.tuner.last_update.skipped is None
