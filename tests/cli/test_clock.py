"""The training clock: what it counts, what it leaves out, where it stops, and that it survives a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments

from ist import IST
from ist.cli.train.arguments import parse_arguments
from ist.cli.train.clock import TrainingClock
from tests.helpers.tiny import tiny_lora, tiny_rows


class Time:
    """A clock that goes on only where a test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Spend(TrainerCallback):
    """Lets time pass: a second for each step, a hundred for each evaluation, a thousand for each checkpoint."""

    def __init__(self, time: Time) -> None:
        self.time = time

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.time.seconds += 1

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.time.seconds += 100

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.time.seconds += 1000


def train(folder: Path, budget: float | None = None, resume: str | None = None, **options: Any) -> tuple[Trainer, Any]:
    time = Time()
    clock = TrainingClock(budget, time)
    args = TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4,
        **{"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 3, "logging_steps": 2, **options},
    )  # fmt: skip
    trainer = Trainer(
        model=tiny_lora(), args=args, train_dataset=tiny_rows(), eval_dataset=tiny_rows(8),  # pyright: ignore[reportArgumentType]
        callbacks=[IST(update_interval=2), Spend(time), clock],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, clock


def test_steps_count_and_nothing_else(tmp_path: Path) -> None:
    trainer, clock = train(tmp_path)
    assert clock.seconds == 8
    counts = {entry["step"]: entry["step_seconds"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert counts == {2: 2, 4: 4, 6: 6, 8: 8}
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["TrainingClock"]["attributes"] == {"seconds": 6}


@pytest.mark.parametrize(("budget", "steps"), [(2.5, 3), (3, 3), (100, 8), (None, 8)])
def test_it_stops_when_the_time_is_over(tmp_path: Path, budget: float | None, steps: int) -> None:
    trainer, clock = train(tmp_path, budget)
    assert trainer.state.global_step == clock.seconds == steps


def test_a_resume_goes_on_counting(tmp_path: Path) -> None:
    train(tmp_path)
    trainer, clock = train(tmp_path, 5, resume=str(tmp_path / "checkpoint-3"))
    assert trainer.state.global_step == clock.seconds == 5


def test_a_checkpoint_without_a_count_starts_one(tmp_path: Path) -> None:
    train(tmp_path)
    file = tmp_path / "checkpoint-3" / "trainer_state.json"
    state = json.loads(file.read_text())
    del state["stateful_callbacks"]["TrainingClock"]
    file.write_text(json.dumps(state))
    (tmp_path / "checkpoint-3" / "ist_manifest.json").unlink()
    trainer, clock = train(tmp_path, resume=str(tmp_path / "checkpoint-3"))
    assert (trainer.state.global_step, clock.seconds) == (8, 5)


def test_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_train_seconds=0.0 is no time to train in: give more than 0\."):
        parse_arguments(["--task=word-problems", "--max_train_seconds=0"])
