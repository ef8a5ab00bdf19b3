"""What `ist train` does where nobody says otherwise, and what it says of it before it begins."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from trl import SFTTrainer

from ist.cli.main import main
from ist.cli.train.arguments import parse_arguments
from ist.cli.train.defaults import REPORTERS, check_reporters
from ist.cli.train.header import adapter_line, data_line, num_steps, round_number
from ist.cli.train.numbers import count_held_out
from ist.runtime.packages import distribution_of

RUN = ["--model_name_or_path=x", "--task=word-problems", "--bf16=false", "--use_cpu"]


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        ([], 2e-4),
        (["--adapter=series"], 2e-4),
        (["--method=peft", "--adapter=dora"], 2e-4),
        (["--method=full"], 2e-5),
        (["--method=lisa"], 2e-5),
        (["--method=full", "--learning_rate=1e-3"], 1e-3),
        (["--learning-rate", "2e-5"], 2e-5),
    ],
    ids=str,
)
def test_the_learning_rate_suits_what_trains(flags: list[str], rate: float) -> None:
    assert parse_arguments([*RUN, *flags]).training.learning_rate == rate


def test_a_recipe_keeps_its_learning_rate(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: word-problems\nbf16: false\nlearning_rate: 2.0e-5\n")
    run = parse_arguments(["--recipe", str(tmp_path / "mine.yaml")])
    assert run.training.learning_rate == 2e-5


def test_the_quickstart_is_what_its_recipe_says() -> None:
    run = parse_arguments(["--bf16=false", "--use_cpu"])
    assert (run.recipe, run.training.learning_rate, run.training.gradient_checkpointing) == ("quickstart", 2e-3, False)
    assert len(run.model.lora_target_modules or ()) == 7


@pytest.mark.parametrize(
    ("flags", "modules"),
    [
        ([], "all-linear"),
        (["--lora_target_modules=all-linear"], "all-linear"),
        (["--adapter=adalora", "--max_steps=10"], "all-linear"),
        (["--lora_target_modules=q_proj"], {"q_proj"}),
        (["--lora_target_modules=q_proj", "--adapter=adalora", "--max_steps=10"], {"q_proj"}),
        (["--lora_target_modules=self_attn.q_proj"], {"self_attn.q_proj"}),
        (["--lora_target_modules", "q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["--lora_target_modules=.*[qv]_proj"], ".*[qv]_proj"),
        (["--lora_target_parameters", "a.weight", "b.weight"], None),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_the_modules_that_lora_is_put_on(flags: list[str], modules: Any) -> None:
    assert parse_arguments([*RUN, *flags]).peft_config().target_modules == modules


def test_one_module_in_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: word-problems\nbf16: false\nlora_target_modules: [q_proj]\n")
    run = parse_arguments(["--recipe", str(tmp_path / "mine.yaml")])
    assert run.peft_config().target_modules == {"q_proj"}


@pytest.mark.parametrize(
    ("size", "rows", "held_out"),
    [
        (None, 200, 20), (None, 100_000, 120), (None, 1200, 120), (None, 5, 1), (None, 2, 1), (None, 1, 0), ("0", 9, 0),
        ("120", 200, 120), ("0.1", 200, 20), ("0.1", 3, 1), ("0.0", 200, 0), ("0.25", 10, 2), ("1", 2, 1),
    ],
)  # fmt: skip
def test_rows_held_out(size: str | None, rows: int, held_out: int) -> None:
    assert count_held_out(size, rows) == held_out


@pytest.mark.parametrize(("size", "rows"), [("200", 200), ("9", 3), ("0.99", 2), ("0.5", 1)])
def test_nothing_left_to_train_on(size: str, rows: int) -> None:
    with pytest.raises(ValueError, match=f"validation_size={size} leaves nothing of {rows} rows to train on"):
        count_held_out(size, rows)


# ---- Reporters


def test_reporters_that_are_there_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    check_reporters([])
    monkeypatch.setattr("ist.cli.train.defaults.find_spec", lambda name: object())
    check_reporters(list(REPORTERS))
    monkeypatch.setattr("ist.cli.train.defaults.find_spec", lambda name: None)
    for name, module in REPORTERS.items():
        package = distribution_of(module)
        with pytest.raises(ValueError, match=f"{name} needs the package {package}, .* run `pip install {package}`"):
            check_reporters([name])
    with pytest.raises(ValueError, match="report_to='wandbb' is unknown: choose some of azure_ml, "):
        check_reporters(["wandbb"])


def test_every_reporter_of_transformers_is_known() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(INTEGRATION_TO_CALLBACK) <= set(REPORTERS)


# ---- The header


def training_arguments(**changes: Any) -> Any:
    values = {
        "per_device_train_batch_size": 8, "world_size": 1, "gradient_accumulation_steps": 1, "max_steps": -1,
        "num_train_epochs": 3.0, "dataloader_drop_last": False, "learning_rate": 2e-4, "lr_scheduler_type": "linear",
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 100, 181])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("max_steps", [-1, 5])
def test_steps_are_the_trainers(rows: int, accumulation: int, drop_last: bool, max_steps: int, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        str(tmp_path), use_cpu=True, num_train_epochs=2.5, gradient_accumulation_steps=accumulation,
        dataloader_drop_last=drop_last, max_steps=max_steps, report_to="none",
    )  # fmt: skip
    trainer = Trainer(torch.nn.Linear(1, 1), args)
    if drop_last and rows < 8:
        return  # There is no batch, and the Trainer does not train.
    loader = DataLoader(range(rows), batch_size=8, drop_last=drop_last)  # type: ignore[arg-type]
    assert trainer.set_initial_training_values(args, loader)[-1] == num_steps(args, rows)


@pytest.mark.parametrize(
    ("rows", "held_out", "changes", "line"),
    [
        (180, 20, {}, "180 rows, 20 held out; 69 steps of 8 rows, about 1.6 k tokens"),
        (180, None, {"max_steps": 5}, "180 rows, none held out; 5 steps of 8 rows, about 120 tokens"),
        (180, 20, {"packing": True}, "180 packed rows, 20 held out; 69 steps of 8 rows, about 1.6 k tokens"),
        (32, 1, {"world_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1},
         "32 rows, 1 held out; 1 steps of 32 rows, about 96 tokens"),
    ],
)  # fmt: skip
def test_the_line_of_the_data(rows: int, held_out: int | None, changes: dict[str, Any], line: str) -> None:
    import datasets

    train = datasets.Dataset.from_list([{"input_ids": [1, 2, 3]}] * rows)
    evaluation = None if held_out is None else range(held_out)
    trainer = SimpleNamespace(args=training_arguments(**changes), train_dataset=train, eval_dataset=evaluation)
    assert data_line(trainer) == line


def test_the_line_of_streamed_data() -> None:
    trainer = SimpleNamespace(args=training_arguments(), train_dataset=iter(()), eval_dataset=None)
    assert data_line(trainer) == "streamed rows, none held out"
    trainer.args = training_arguments(max_steps=4)
    assert data_line(trainer) == "streamed rows, none held out; 4 steps of 8 rows"


@pytest.mark.parametrize(
    ("value", "text"), [(950, "950"), (1234, "1.2 k"), (12_345, "12 k"), (3_400_000, "3.4 M"), (2e10, "20 G")]
)
def test_a_number_for_a_reader(value: float, text: str) -> None:
    assert round_number(value) == text


def test_the_line_of_whole_layers() -> None:
    assert adapter_line(torch.nn.Linear(1, 1), "none", training_arguments()) == "learning rate 0.0002 (linear)"


SHOWN = [
    ([], "lora, rank 16, on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; learning rate 0.0002"),
    (["--lora_target_modules=q_proj", "--lora_r=4"], "lora, rank 4, on q_proj; learning rate 0.0002 (linear)"),
    (["--adapter=series", "--bottleneck_size=8"], "series, width 8, on "),
    (["--adapter=adalora", "--max_steps=10"], "adalora, rank 24, on q_proj, k_proj"),
    (["--method=full"], "learning rate 2e-05 (linear)"),
]


@pytest.mark.parametrize(("flags", "line"), SHOWN, ids=[" ".join(flags) or "bare" for flags, _ in SHOWN])
def test_a_header_says_what_trains(
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    line: str,
) -> None:
    """Up to the first step, which does not come."""

    def stop(*arguments: Any, **options: Any) -> None:
        raise ValueError("enough")

    monkeypatch.setattr(SFTTrainer, "evaluate", stop)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"Say {i}.", "output": str(i)} for i in range(200)]))
    where = ["--model_name_or_path", str(tiny_model_folder), "--data_files", str(rows), "--use_cpu"]
    assert main(["train", *where, "--output_dir", str(tmp_path / "run"), "--validation_size=0.1", *flags]) == 2
    console, error = capsys.readouterr()
    assert error.endswith("ist train: error: enough\n")
    assert line in console
    steps = 10 if "--max_steps=10" in flags else 69
    assert re.search(rf"^180 rows, 20 held out; {steps} steps of 8 rows, about \d+ k tokens$", console, re.MULTILINE)
