"""Ctrl-C in an evaluation or after the last step saves what was trained, and the message names where it is."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ist.cli.main import main
from ist.cli.train.clock import TrainingClock

FLAGS = [
    "train", "--task=word-problems", "--num_train_problems=16", "--num_test_problems=4", "--max_steps=6", "--use_cpu",
    "--save_strategy=no", "--bf16=false", "--lora_r=2", "--update_interval=2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Where the tests run in the background, SIGINT is ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, event: str, step: int) -> None:
    """Have SIGINT come once at an event of the training."""
    own, sent = getattr(TrainingClock, event, None), []

    def with_signal(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        result = own(self, args, state, control, **kwargs) if own else None
        if state.global_step == step and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(TrainingClock, event, with_signal, raising=False)


@pytest.mark.parametrize("step", [3, 6])
def test_in_an_evaluation(
    step: int,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt_at(monkeypatch, "on_evaluate", step)
    where = ["--model_name_or_path", str(tiny_model_folder), "--output_dir", str(tmp_path / "run")]
    arguments = [*FLAGS, *where, "--eval_strategy=steps", "--eval_steps=3"]
    with pytest.raises(SystemExit, match="130"):
        main(arguments)
    said = capsys.readouterr().err
    assert f"stopped after step {step}; the same command with --resume_from_checkpoint last" in said
    assert (tmp_path / "run" / f"checkpoint-{step}" / "adapter_model.safetensors").is_file()
    assert main([*arguments, "--resume_from_checkpoint", "last"]) == 0
    assert json.loads((tmp_path / "run" / "ist_result.json").read_text())["num_steps"] == 6


def test_after_the_last_step(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(monkeypatch, "on_train_end", 6)
    where = ["--model_name_or_path", str(tiny_model_folder), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="130"):
        main([*FLAGS, *where])
    assert f"stopped after the last step, 6; the adapter is in {tmp_path / 'run'}" in capsys.readouterr().err
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
