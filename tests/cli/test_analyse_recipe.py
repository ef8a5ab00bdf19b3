"""The recipe of figure 2b that an analysis leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ist.cli.analyse.recipe import read_flags, selections, write_selection_recipe
from ist.cli.compare.recipe import read_comparison, to_arguments
from ist.cli.train.arguments import parse_arguments


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        (["--mu=3", "--task", "word-problems"], {"mu": 3, "task": "word-problems"}),
        (["--data_files", "a.json", "b.json"], {"data_files": ["a.json", "b.json"]}),
        (["--task=x", "--use_cpu", "--bf16=false"], {"task": "x", "use_cpu": True, "bf16": False}),
        (["--task=x", "--save-strategy=no"], {"task": "x", "save_strategy": "no"}),
        (["--task=x", "--learning_rate=2e-4"], {"task": "x", "learning_rate": "2e-4"}),
        (["--task=x", "--mu=3", "--mu=4"], {"task": "x", "mu": 4}),
    ],
)
def test_flags_of_a_command_line(arguments: list[str], flags: dict[str, Any]) -> None:
    assert read_flags(arguments) == flags


def test_the_flags_of_the_recipe_are_there_too() -> None:
    flags = read_flags(["--recipe", "quickstart", "--mu", "9"])
    assert (flags["mu"], flags["max_steps"], flags["task"]) == (9, 180, "word-problems")


def test_the_most_and_the_least_important() -> None:
    methods = selections([0.3, 0.1, 0.9, 0.2, 0.5, 0.0])
    assert {name: method.get("fixed_layers") for name, method in methods.items()} == {
        "all": None, "top-1": "2", "top-2": "2,4", "bottom-1": "5", "bottom-2": "1,5",
        "full": None,
    }  # fmt: skip
    assert len(selections([0.0] * 32)) == 1 + 2 * 5 + 1  # 1, 2, 4, 8, 16
    assert "full" not in selections([0.0] * 4, full=False)


@pytest.mark.parametrize(("flag", "last"), [("--lora_r=2", "full"), ("--load_in_4bit", "bottom-1")])
def test_full_fine_tuning_is_the_last_line_where_it_can_be(tmp_path: Path, flag: str, last: str) -> None:
    """Figure 2b: with a learning rate of its own, and not of quantised weights."""
    write_selection_recipe(tmp_path, ["--model_name_or_path=m", "--learning_rate=1e-3", flag], [0.1, 0.2])
    methods = read_comparison(tmp_path / "tune-selected.yaml").methods
    assert methods[-1].name == last
    full = parse_arguments(to_arguments({**methods[-1].flags, "use_cpu": True, "bf16": False}))
    assert full.training.learning_rate == (2e-5 if last == "full" else 1e-3)
    assert (full.ist.method, full.ist.adapter) == (("full", "none") if last == "full" else ("fixed", "lora"))


def test_what_no_recipe_may_have_is_in_the_command(tmp_path: Path) -> None:
    arguments = ["--model_name_or_path=/models/llama", "--task=x", "--seed=3", "--method=ist", "--output_dir=runs/a"]
    command = write_selection_recipe(tmp_path, arguments, [0.1, 0.2])
    file = tmp_path / "tune-selected.yaml"
    assert command == f"ist compare --recipe {file} --model_name_or_path=/models/llama"
    assert command in file.read_text()
    assert yaml.safe_load(file.read_text())["flags"] == {"task": "x"}
