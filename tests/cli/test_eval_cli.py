"""`ist eval` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ist.bottleneck import BottleneckConfig
from ist.cli.checkout import commit
from ist.cli.eval import command as eval_module
from ist.cli.eval.arguments import parse_eval_arguments
from ist.cli.eval.command import load_tasks
from ist.cli.main import main
from ist.cli.train.arguments import parse_arguments
from ist.cli.train.command import train
from ist.cli.train.data import load_data
from ist.experiments.data import instruction_prompt
from tests.helpers.task_rows import numbered_rows, raw_row, write_collection
from tests.helpers.tiny import trainable

RESULT_KEYS = {"model", "adapter", "protocol", "settings", "tasks", "device", "versions", "commit", "seconds"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tasks = {name: [raw_row(name)] * 2 for name in ("piqa", "MultiArith", "AQuA")}
    return write_collection(tmp_path / "data", {"boolq": numbered_rows(6), **tasks})


def run(model: Path, output: Path, *arguments: str | Path) -> dict[str, Any]:
    status = main(["eval", "--model_name_or_path", str(model), "--output_dir", str(output), *map(str, arguments)])
    assert status == 0
    return json.loads((output / "ist_eval.json").read_text())


@pytest.mark.parametrize(
    ("protocol", "tasks", "arguments"),
    [
        ("generate", ["boolq", "MultiArith,AQuA"], ["--max_new_tokens=2", "--num_beams=2"]),
        ("likelihood", ["boolq", "piqa"], ["--options=text"]),
        ("loss", ["boolq", "MultiArith"], ["--max_length=64"]),
        ("generate", ["word-problems"], ["--limit=3"]),
    ],
)
def test_a_result_is_shown_and_written(
    tiny_model_folder: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    protocol: str, tasks: Sequence[str], arguments: Sequence[str],
) -> None:  # fmt: skip
    output = tmp_path / "out"
    flags = [f"--protocol={protocol}", "--data_folder", folder, "--tasks", *tasks, *arguments]
    result = run(tiny_model_folder, output, *flags)
    console = capsys.readouterr().out
    names = [name for task in tasks for name in task.split(",")]
    assert set(result) == RESULT_KEYS
    assert list(result["tasks"]) == names
    assert (result["protocol"], result["adapter"], result["seconds"] > 0) == (protocol, None, True)
    assert {"ist-peft", "torch", "transformers", "peft"} <= set(result["versions"])
    for name, figures in result["tasks"].items():
        lines = (output / "answers" / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == {"boolq": 6, "word-problems": 3}.get(name, 2)
        assert set(figures) == (
            {"loss", "perplexity", "tokens"} if protocol == "loss" else {"accuracy", "low", "high", "correct", "total"}
        )
        shown = f"loss {figures['loss']:.4f}" if protocol == "loss" else f"{figures['accuracy']:.1%} ("
        assert f"{name} " in console
        assert shown in console
    assert ("mean" in console) == (protocol != "loss" and len(names) > 1)
    assert str(output / "ist_eval.json") in console


def test_other_tasks_come_beside_those_that_are_there(tiny_model_folder: Path, folder: Path, tmp_path: Path) -> None:
    flags = ["--protocol=likelihood", "--data_folder", folder, "--tasks"]
    first = run(tiny_model_folder, tmp_path / "out", *flags, "boolq")
    both = run(tiny_model_folder, tmp_path / "out", *flags, "piqa")
    assert list(both["tasks"]) == ["boolq", "piqa"]
    assert both["tasks"]["boolq"] == first["tasks"]["boolq"]


@pytest.mark.parametrize("kind", ["lora", "series"])
def test_an_adapter_counts(tiny_model_folder: Path, folder: Path, tmp_path: Path, kind: str) -> None:
    config = (
        LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        if kind == "lora"
        else BottleneckConfig(mode="series", bottleneck_size=4, task_type="CAUSAL_LM")
    )
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    adapted_model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in trainable(adapted_model):
            parameter.add_(0.1)  # adapters add nothing at first
    adapted_model.save_pretrained(str(tmp_path / "adapter"))
    flags = ["--protocol=loss", "--data_folder", folder, "--tasks=boolq"]
    plain = run(tiny_model_folder, tmp_path / "plain", *flags)
    adapted = run(tiny_model_folder, tmp_path / "adapted", *flags, "--adapter", tmp_path / "adapter")
    assert adapted["adapter"] == str(tmp_path / "adapter")
    assert adapted["tasks"]["boolq"]["loss"] != plain["tasks"]["boolq"]["loss"]
    assert main(["eval", "--model_name_or_path", str(tiny_model_folder), "--output_dir", str(tmp_path / "adapted"),
                 *map(str, flags)]) == 2  # fmt: skip


def test_files_have_a_loss(tiny_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    (tmp_path / "story.txt").write_bytes(b"\xef\xbb\xbf" + b"Once upon a time. " * 5)
    files = ["--data_files", tmp_path / "mine.jsonl", "--text_files", tmp_path / "story.txt", "--window=16"]
    result = run(tiny_model_folder, tmp_path / "out", "--protocol=loss", *files)
    assert {name: figures["tokens"] for name, figures in result["tasks"].items()} == {"mine": 2, "story": 89}


def test_the_settings_of_the_paper(
    tiny_model_folder: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--data_folder", folder, "--tasks=boolq", "--generation=paper", "--max_new_tokens=1"]
    result = run(tiny_model_folder, tmp_path / "a", *flags)
    assert result["settings"]["generation"] == {
        "num_beams": 4, "do_sample": False, "temperature": 0.1, "top_p": 0.75, "top_k": 40,
    }  # fmt: skip
    assert result["settings"]["extraction"] == "paper"
    assert not caplog.records
    result = run(tiny_model_folder, tmp_path / "b", *flags, "--num_beams=2", "--top_k=5", "--extraction=careful")
    assert (result["settings"]["generation"]["num_beams"], result["settings"]["generation"]["top_k"]) == (2, 5)
    assert result["settings"]["extraction"] == "careful"
    assert "--top_k without --do_sample: no effect" in caplog.text


def test_an_interrupted_evaluation_says_how_to_go_on(
    tiny_model_folder: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    flags = ["--data_folder", str(folder), "--tasks=boolq", "--protocol=likelihood", "--batch_size=2"]
    with monkeypatch.context() as patch:
        patch.setattr(eval_module.Progress, "__call__", stop)
        command = [
            "eval",
            "--model_name_or_path",
            str(tiny_model_folder),
            "--output_dir",
            str(tmp_path / "out"),
            *flags,
        ]
        assert main(command) == 130
    assert "the same command continues from the answers" in capsys.readouterr().err
    assert len((tmp_path / "out" / "answers" / "boolq.jsonl").read_text().splitlines()) == 2
    assert run(tiny_model_folder, tmp_path / "out", *flags)["tasks"]["boolq"]["total"] == 6


BOOLQ = ["--model_name_or_path=x", "--tasks=boolq"]
MISTAKES = [
    ([], "No model given: --model_name_or_path takes a folder"),
    (["--model_name_or_path=x"], "Nothing to evaluate on: give --tasks, --data_files, --text_files"),
    (["--model_name_or_path=x", "--tasks=riddles"], "task='riddles' is unknown"),
    (BOOLQ, "boolq does not come with this library: give --data_folder FOLDER"),
    ([*BOOLQ, "--data_folder=none"], "none is not a folder"),
    ([*BOOLQ, "--data_folder=none", "--from_hub"], "the tasks come from one of them"),
    (["--model_name_or_path=x", "--text_files=a.txt"], "--text_files has a loss alone: add --protocol loss"),
    (["--model_name_or_path=x", "--text_files=a.txt", "--protocol=loss"], "There is no file a.txt"),
    ([*BOOLQ, "--protocol=guess"], "--protocol guess is unknown: give one of generate"),
    ([*BOOLQ, "--beams=3"], "There is no flag --beams (did you mean --num_beams?): `ist eval --help`"),
    ([*BOOLQ, "--num_beams=-1"], "num_beams=-1 is not at least 1"),
    (
        ["--model_name_or_path=x", "--tasks=word-problems", "--adapter={folder}"],
        "holds no adapter_config.json, and so no adapter: --adapter takes",
    ),
    ([*BOOLQ, "--data_folder={folder}/data", "--batch_size=0"], "batch_size=0 is not a whole number"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *(argument.format(folder=tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ist eval: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_the_commit_is_known_in_a_checkout_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ist.cli.checkout.__file__", str(tmp_path / "checkout.py"))
    assert commit() is None


# `ist train` on the paper's tasks


def test_the_built_in_problems_are_those_that_training_holds_out() -> None:
    flags = parse_eval_arguments(["--model_name_or_path=x", "--tasks=word-problems", "--limit=30"])
    rows: Any = next(iter(load_tasks(flags).values()))
    problems = load("--task=word-problems", "--num_test_problems=30", "--num_train_problems=10").problems
    assert [row.question for row in rows] == [problem.prompt for problem in problems]


def test_a_recipe_names_tasks(tmp_path: Path) -> None:
    write_collection(tmp_path, {"boolq": numbered_rows(5), "piqa": [raw_row("piqa")]}, "train")
    (tmp_path / "mine.yaml").write_text("task: [boolq, piqa]\nvalidation_size: 0\nbf16: false\n")
    assert len(load("--recipe", tmp_path / "mine.yaml", "--data_folder", tmp_path).train) == 6


def load(*arguments: str | Path) -> Any:
    return load_data(parse_arguments([*map(str, arguments), "--bf16=false"]))


def test_training_leaves_test_rows_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, test = numbered_rows(20), numbered_rows(3)
    test[1]["instruction"] = test[1]["instruction"].replace("is 1", "IS   1")
    write_collection(tmp_path, {"boolq": train, "piqa": [raw_row("piqa")] * 2}, "train")
    write_collection(tmp_path, {"boolq": test})
    data = load("--task", "boolq", "piqa", "--data_folder", tmp_path, "--validation_size=4")
    rows = [*data.train, *data.evaluation]
    assert (len(data.train), len(data.evaluation)) == (20 + 2 - 3 - 4, 4)
    asked = {row["prompt"] for row in rows}
    assert asked == {instruction_prompt(row) for row in [*train[3:], raw_row("piqa")]}
    assert "3 of 22 training rows are test rows of boolq: left out" in caplog.text
    assert "holds no test set of piqa: its rows are not looked for" in caplog.text
    assert len(load("--task=boolq,piqa", "--data_folder", tmp_path, "--validation_size=0").train) == 19


def test_files_are_checked_against_test_tasks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_collection(tmp_path, {"boolq": numbered_rows(2)})
    (tmp_path / "mine.json").write_text(json.dumps(numbered_rows(5)))
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "no"}]}
        for text in ("is 0 big?", "is 9 big?")
    ]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    flags = ["--data_folder", tmp_path, "--validation_size=0"]
    assert len(load("--data_files", tmp_path / "mine.json", *flags).train) == 5
    assert len(load("--data_files", tmp_path / "mine.json", "--test_tasks=boolq", *flags).train) == 3
    assert len(load("--data_files", tmp_path / "chats.json", "--test_tasks=boolq", *flags).train) == 1
    write_collection(tmp_path, {"boolq": numbered_rows(5)})
    with pytest.raises(ValueError, match="All 5 training rows are test rows of boolq: train on other data"):
        load("--data_files", tmp_path / "mine.json", "--test_tasks=boolq", *flags)


def test_a_training_on_a_task_says_what_was_left_out(
    tiny_model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_collection(write_collection(tmp_path, {"boolq": numbered_rows(20)}, "train"), {"boolq": numbered_rows(3)})
    result = train([
        "--model_name_or_path", str(tiny_model_folder), "--task=BOOLQ", "--data_folder", str(tmp_path),
        "--validation_size=4", "--max_steps=2", "--per_device_train_batch_size=4", "--gradient_checkpointing=false",
        "--save_strategy=no", "--use_cpu", "--lora_r=2", "--lora_target_modules", "q_proj", "v_proj",
        "--completion_only_loss=false", "--max_length=128", "--output_dir", str(tmp_path / "run"),
    ])  # fmt: skip
    assert result["num_steps"] == 2
    assert "3 of 20 training rows are test rows of boolq: left out" in caplog.text
