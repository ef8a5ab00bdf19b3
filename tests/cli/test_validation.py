"""The validation loss of `ist train`: the mean over tokens, whatever the batches, the packing and the processes are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import AutoModelForCausalLM

from ist.cli.train.arguments import parse_arguments
from ist.cli.train.command import make_trainer, train
from ist.cli.train.data import load_data
from ist.cli.train.validation import IGNORED, predicted_tokens, without_repeats

# Answers of 1 to 12 tokens after prompts of up to 60: batches differ in their tokens, and wrapped blocks of 16 tokens
# hold none at all where they lie within a prompt.
ROWS = [{"prompt": "q" * (5 + 11 * (number % 6)), "completion": "a" * (1 + number % 12)} for number in range(11)]


def arguments(model: Path, folder: Path, *flags: str) -> list[str]:
    (folder / "train.json").write_text(json.dumps(ROWS))
    return [
        "--model_name_or_path", str(model), "--data_files", str(folder / "train.json"), "--validation_size=9",
        "--max_steps=1", "--per_device_train_batch_size=1", "--per_device_eval_batch_size=2", "--save_strategy=no",
        "--gradient_checkpointing=false", "--use_cpu", "--bf16=false", "--lora_r=2", "--lora_target_modules", "q_proj",
        "v_proj", "--output_dir", str(folder / "run"), *flags,
    ]  # fmt: skip


@torch.no_grad()
def by_hand(model: Any, rows: Any) -> tuple[float, int]:
    """The mean over the predicted tokens of some rows, or 0 where there are none, and their number."""
    total, tokens = 0.0, 0
    for row in rows:
        labels = torch.tensor(row["labels"][1:])
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        tokens += int(labels.ne(IGNORED).sum())
    return total / max(1, tokens), tokens


WRAPPED = ("--packing", "--packing_strategy=wrapped", "--max_length=16")


@pytest.mark.parametrize(("flags", "empty"), [((), False), (WRAPPED, True)])
def test_the_loss_is_the_mean_over_tokens(
    tiny_model_folder: Path, tmp_path: Path, flags: tuple[str, ...], empty: bool
) -> None:
    run = parse_arguments(arguments(tiny_model_folder, tmp_path, *flags))
    trainer = make_trainer(run, load_data(run))
    rows: list[Any] = list(cast("Any", trainer.eval_dataset))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    loss, tokens = by_hand(model, rows)
    batches = [by_hand(model, rows[start : start + 2]) for start in range(0, len(rows), 2)]
    assert tokens > 0
    assert any(by_hand(model, [row])[1] == 0 for row in rows) == empty
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-6)
    of_batches = sum(mean for mean, _ in batches) / len(batches)
    assert abs(of_batches - loss) > (0.1 if empty else 1e-5)  # what a mean over batches would be


def test_the_losses_on_the_way_are_means_over_tokens_too(tiny_model_folder: Path, tmp_path: Path) -> None:
    """A rate of 0 leaves the model as it is: before, during and after training the loss is one."""
    flags = ["--eval_strategy=steps", "--eval_steps=1", "--learning_rate=0", "--weight_decay=0"]
    result = train(arguments(tiny_model_folder, tmp_path, *WRAPPED, *flags))
    (on_the_way,) = [entry["eval_loss"] for entry in result["log"] if "eval_loss" in entry]
    assert result["before"]["loss"] == on_the_way == result["after"]["loss"]


def test_a_validation_set_without_a_predicted_token_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    run = parse_arguments(arguments(tiny_model_folder, tmp_path))
    trainer = make_trainer(run, load_data(run))
    rows: Any = trainer.eval_dataset
    empty: Any = rows.map(lambda row: {"labels": [IGNORED] * len(row["input_ids"])})
    with pytest.raises(ValueError, match="No token of the validation set is predicted"):
        trainer.evaluate(empty)


@pytest.mark.parametrize(("labels", "count"), [([[1, 2, 3]], 2), ([[1, IGNORED, 3], [IGNORED] * 3], 1)])
def test_tokens_are_counted_but_the_first(labels: list[list[int]], count: int) -> None:
    assert predicted_tokens({"labels": torch.tensor(labels)}) == count
    assert predicted_tokens({"labels": torch.tensor(labels), "shift_labels": torch.tensor([[5, IGNORED]])}) == 1


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("num_rows", range(1, 14))
def test_each_row_counts_on_one_process(num_rows: int, num_processes: int) -> None:
    """With accelerate's own way of sharing batches out; of the last one, only rows that have not come yet count."""
    batches = BatchSampler(SequentialSampler(range(num_rows)), batch_size=2, drop_last=False)
    shares: Any = [list(cast("Any", BatchSamplerShard(batches, num_processes, rank))) for rank in range(num_processes)]
    counted: list[int] = []
    for rank, share in enumerate(shares):
        for number, batch in enumerate(share):
            inputs = {"labels": torch.tensor([[row, row] for row in batch])}
            remainder = num_rows % (2 * num_processes) if number == len(share) - 1 else 0
            kept = without_repeats(inputs, remainder, rank) if remainder > 0 else inputs
            counted += [int(row[0]) for row in kept["labels"] if row[0] != IGNORED]
    assert sorted(counted) == list(range(num_rows))


def test_flattened_rows_are_left_as_they_are() -> None:
    inputs = {"labels": torch.ones(1, 8), "position_ids": torch.arange(8)[None]}
    assert without_repeats(inputs, 1, 1) is inputs
