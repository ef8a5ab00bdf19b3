"""A metric of the user's choice on validation rows: `ist train` before and after, and `ist compare`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ist.cli.analyse.recipe import write_selection_recipe
from ist.cli.main import main
from ist.cli.recipes.safety import COMMAND_LINE_ONLY, TRAINING_KEYS, without_authority
from ist.cli.train.arguments import parse_arguments
from ist.cli.train.command import train
from ist.cli.train.data import load_data
from ist.cli.train.metric import spread

ROWS = [
    {"instruction": f"Say {word} {number}.", "output": f"It is {word}", "answer": word, "weight": number}
    for number, word in enumerate(["yes", "no"] * 12)
]
METRIC = "def graded(response, expected, row):\n    return row['weight'] / 2\n"


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return write(tmp_path / "mine.jsonl", ROWS)


def flags(model: Path, mine: Path, output: Path) -> list[str]:
    return [
        "--model_name_or_path", str(model), "--data_files", str(mine), "--max_steps=1", "--save_strategy=no",
        "--use_cpu", "--lora_r=2", "--lora_target_modules", "q_proj", "--method=peft", "--bf16=false",
        "--output_dir", str(output),
    ]  # fmt: skip


def load(*arguments: str | Path) -> Any:
    return load_data(parse_arguments([*map(str, arguments), "--bf16=false"]))


def test_a_users_function_marks_before_and_after(
    tiny_model_folder: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_metric.py").write_text(METRIC)
    own = ["--metric_function", f"{tmp_path / 'my_metric.py'}:graded", "--max_new_tokens=1", "--metric_rows=4"]
    result = train([*flags(tiny_model_folder, mine, tmp_path / "run"), "--validation_files", str(mine), *own])
    mean = (0 + 6 + 12 + 18) / 2 / 4
    assert (result["before"]["graded score"], result["after"]["graded score"]) == (mean, mean)
    written = json.loads((tmp_path / "run" / "ist_result.json").read_text())["metric"]
    assert written["name"] == "graded score"
    assert re.fullmatch(rf"{tmp_path}/my_metric\.py:graded [0-9a-f]{{16}}", written["metric"])
    assert (written["rows"], written["validation_rows"], written["max_new_tokens"]) == (4, 24, 1)
    half = 3.182446 * 15**0.5 / 2  # of 0, 3, 6 and 9, whose variance is 15, with Student's t of 3 degrees
    interval = {"low": pytest.approx(mean - half), "high": pytest.approx(mean + half)}
    assert written["before"] == written["after"] == {"score": mean, **interval, "total": 4}
    console = capsys.readouterr().out
    assert "graded score before and after on 4 of 24 validation rows, up to 1 new tokens each" in console
    assert console.count(f"graded score {mean:.3f}") == 2
    assert re.search(r"graded score +│ 4\.500 +│ 4\.500", console)


def test_label_accuracy_of_rows_held_out(
    tiny_model_folder: Path, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ist.cli.train.metric.answer_own_rows", lambda model, tokenizer, rows, marker, settings: [
        [(index, {"score": marker(row, "YES!")}) for index, row in enumerate(rows)]
    ])  # fmt: skip
    own = ["--metric=label_accuracy", "--validation_size=8", "--seed=3"]
    result = train([*flags(tiny_model_folder, mine, tmp_path / "run"), *own])
    held_out = load("--data_files", mine, *own).own_rows
    share = sum(row.expected == "yes" for row in held_out) / 8
    assert result["before"]["label_accuracy"] == result["after"]["label_accuracy"] == share
    assert result["metric"]["before"]["total"] == 8
    assert result["metric"]["max_new_tokens"] == 32


def test_the_rows_marked_are_those_held_out(mine: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", [{"instruction": f"Add {n}.", "output": str(n)} for n in range(6)])
    both = ["--data_files", mine, other, "--validation_size=9"]
    plain, marked = load(*both), load(*both, "--metric=exact_match")
    assert list(marked.evaluation) == list(plain.evaluation)
    assert list(marked.train) == list(plain.train)
    assert [row.prompt for row in marked.own_rows] == plain.evaluation["prompt"][:]
    said = {f"It is {row['answer']}": row["answer"] for row in ROWS}
    assert [row.expected for row in marked.own_rows] == [said.get(c, c) for c in plain.evaluation["completion"]]
    assert plain.own_rows == ()
    validation = load("--data_files", other, "--validation_files", mine, "--metric=exact_match")
    assert [row.fields for row in validation.own_rows] == ROWS


def test_rows_are_spread_over_a_sorted_file() -> None:
    rows: Any = list(range(10))
    assert spread(rows, 4) == [0, 2, 5, 7]
    assert spread(rows, 20) == rows


MISTAKES = [
    (["--metric=f1"], "metric='f1'"),
    (["--labels", "yes"], "--labels are for --metric label_accuracy: add it."),
    (["--metric=exact_match", "--metric_function=a:b"], "--metric and --metric_function given"),
    (["--metric_rows=0", "--metric=exact_match"], "metric_rows=0"),
    (["--metric_rows=3"], "--metric_rows is for a metric: add --metric or --metric_function."),
    (["--metric_function=none.py:f"], "none.py is not a file"),
    (["--metric=exact_match", "--validation_size=0"], "--metric needs validation rows"),
    (["--metric=label_accuracy", "--labels", "yes"], "which is none of the labels yes: add it to --labels"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line(
    tiny_model_folder: Path, mine: Path, tmp_path: Path, capsys: Any, arguments: list[str], message: str
) -> None:
    assert main(["train", *flags(tiny_model_folder, mine, tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_built_in_task_marks_its_own() -> None:
    with pytest.raises(ValueError, match="marks its problems by itself: leave --metric out"):
        load("--task=word-problems", "--metric=exact_match")


def test_a_function_comes_from_the_command_line_alone(tmp_path: Path, capsys: Any) -> None:
    assert {"metric", "labels", "metric_rows", "max_new_tokens"} <= TRAINING_KEYS
    assert "metric_function" in COMMAND_LINE_ONLY
    (tmp_path / "evil.py").write_text("raise SystemExit('run')\n")
    (tmp_path / "recipe.yaml").write_text(f"metric_function: {tmp_path}/evil.py:f\n")
    for trusted in ([], ["--trust_recipe"]):
        assert main(["train", "--recipe", str(tmp_path / "recipe.yaml"), *trusted]) == 2
        assert "recipe.yaml sets metric_function, which runs code of its own" in capsys.readouterr().err
    compare = "methods:\n  a: {metric_function: 'evil.py:f'}\n"
    (tmp_path / "compare.yaml").write_text(compare)
    assert main(["compare", "--recipe", str(tmp_path / "compare.yaml")]) == 2
    assert "sets metric_function" in capsys.readouterr().err


RECIPES = [
    ("metric_rows: 50\nmax_new_tokens: 9\n", ["--metric_function", "f.py:g"]),
    ("labels: [a, b]\n", ["--metric=label_accuracy"]),
    ("metric: exact_match\nmetric_rows: 3\n", []),
]


@pytest.mark.parametrize(("recipe", "metric"), RECIPES)
def test_a_finished_run_is_analysed_without_its_recipes_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, recipe: str, metric: list[str]
) -> None:
    """What the command line said of a metric is gone; what the recipe said of it does not stand alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(f"task: word-problems\nseed: 3\n{recipe}")
    recorded = ["--recipe", "mine.yaml", *metric, "--bf16=false"]
    (tmp_path / "ist_result.json").write_text(json.dumps({"arguments": recorded}))
    (tmp_path / "adapter_config.json").touch()
    assert main(["analyse", ".", "--num_train_problems=9", "--num_test_problems=0"]) == 2
    assert "The run has no validation data to measure on" in capsys.readouterr().err  # so its flags are allowed
    command = without_authority(recorded, "ist_result.json")
    run = parse_arguments(command, without_metric=True)
    assert (run.training.seed, run.ist.marks, run.ist.labels, run.ist.metric_rows) == (3, False, None, None)
    write_selection_recipe(tmp_path, command, [0.1, 0.2])
    assert yaml.safe_load((tmp_path / "tune-selected.yaml").read_text())["flags"] == {
        "task": "word-problems", "bf16": False,
    }  # fmt: skip


def test_a_finished_run_brings_no_function_along() -> None:
    recorded = ["--seed=1", "--metric_function", "f.py:g", "--max_new_tokens=3", "--labels", "a", "b", "--lora_r=2"]
    assert without_authority(recorded, "ist_result.json") == ["--seed=1", "--lora_r=2"]


def test_a_function_that_fails_after_training_costs_no_adapter(
    tiny_model_folder: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "calls = []\ndef mark(response, expected, row):\n    calls.append(row)\n    return 1 / (len(calls) < 5)\n"
    (tmp_path / "mark.py").write_text(code)
    own = ["--metric_function", f"{tmp_path / 'mark.py'}:mark", "--max_new_tokens=1", "--metric_rows=4"]
    arguments = [*flags(tiny_model_folder, mine, tmp_path / "run"), "--validation_files", str(mine), *own]
    assert main(["train", *arguments]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
