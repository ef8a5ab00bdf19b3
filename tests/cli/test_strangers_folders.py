"""Folders that a stranger gives away: links in them are not written through, and what is damaged is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ist import History
from ist.cli.analyse.command import learned_importance
from ist.cli.analyse.recipe import SELECTION_FILE, write_selection_recipe
from ist.cli.compare.runs import run_command
from ist.cli.main import main
from ist.cli.train.focus import saved_scores
from ist.cli.train.folder import check_links
from ist.cli.train.greedy import read_search
from ist.cli.train.lock import FolderLock
from ist.experiments.evaluation.answers import AnswerFile
from ist.experiments.evaluation.harness import read_results
from ist.runs.checkpoints import MANIFEST_FILE
from ist.runs.history import HISTORY_FILE

SEARCH = {"layers": [1], "num_trainings": 1, "num_steps": 1, "seconds": 1.0}


@pytest.mark.parametrize(
    ("read", "content"),
    [
        *((read_search, {**SEARCH, name: value}) for name, value in (
            ("layers", ["top:/etc/passwd"]), ("layers", []), ("layers", None), ("num_steps", "x"), ("seconds", "x"),
        )),
        *((read_results, {"a": value}) for value in (1, "x", {"correct": 1}, {"correct": 2, "total": 1})),
        *((read, content) for read in (read_search, read_results) for content in ("[]", "{", "[" * 100_000)),
        *((lambda file: saved_scores(file, "parts"), content) for content in (
            "[]", "{", "[" * 100_000, {"scores": None}, {"scores": [10**400]}, {"scores": ["x"]},
        )),
    ],
    ids=range(21),
)  # fmt: skip
def test_a_damaged_file_of_a_run_is_named(read: Any, content: Any, tmp_path: Path) -> None:
    file = tmp_path / "left.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=r"is damaged|cannot be read") as error:
        read(file)
    assert str(error.value).startswith(str(file))
    file.write_text(json.dumps(SEARCH))
    assert read_search(file) == SEARCH


@pytest.mark.parametrize("scores", [[0.5] * 3, [0.5] * 5, [0.5, None, 0.5, 0.5]], ids=["few", "many", "no number"])
def test_scores_that_are_not_those_of_the_layers_are_named(scores: list[Any], tmp_path: Path) -> None:
    file = tmp_path / HISTORY_FILE
    file.write_text(json.dumps({"event": "importance", "step": 5, "importance": scores}) + "\n")
    with pytest.raises(ValueError, match=r"has not a score for each of the model's 4 layers") as error:
        learned_importance(tmp_path, 4)
    assert str(error.value).startswith(str(file))
    with file.open("a") as history:
        history.write(json.dumps({"event": "importance", "step": 10, "importance": [0.1, 0.2, 0.3, 0.4]}) + "\n")
    assert learned_importance(tmp_path, 4) == [0.1, 0.2, 0.3, 0.4], "only the last scores count"


def linked(folder: Path, name: str) -> Path:
    """A file of the user's that a name in a stranger's folder leads to."""
    mine = folder / "mine"
    mine.write_text("precious")
    (folder / name).symlink_to(mine)
    return mine


def test_a_link_in_a_folder_is_not_written_through(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    mine = linked(tmp_path, lock.file.name)
    with pytest.raises(ValueError, match="is a symbolic link, and what it leads to is not written"):
        lock.take()
    (tmp_path / "log").symlink_to(mine)
    with pytest.raises(ValueError, match="is a symbolic link"):
        run_command("train", [], tmp_path / "log", print)
    (tmp_path / "answers").symlink_to(mine)
    answers = AnswerFile(tmp_path / "none", ["a"])
    answers.file = tmp_path / "answers"
    with pytest.raises(ValueError, match="is a symbolic link"):
        answers.add([(0, {})])
    assert mine.read_text() == "precious"


def test_a_run_does_not_begin_in_a_folder_with_links_to_files(tmp_path: Path) -> None:
    """PEFT and the Trainer would write through them."""
    (tmp_path / "checkpoint-1").symlink_to(tmp_path.parent)
    check_links(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
        with pytest.raises(ValueError, match=f"{name} is a symbolic link, and a run would write"):
            check_links(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"trainer_state\.json is a symbolic link, and a run would write"):
        check_links(tmp_path)


@pytest.mark.parametrize("resume_step", [None, 3])
@pytest.mark.parametrize("exists", [True, False])
def test_a_history_is_not_written_through_a_link(tmp_path: Path, resume_step: int | None, exists: bool) -> None:
    mine = linked(tmp_path, "history.jsonl")
    mine.write_text("") if exists else mine.unlink()
    with pytest.raises(ValueError, match="is a symbolic link"):
        History(tmp_path / "history.jsonl", resume_step)
    assert mine.exists() is exists
    assert not exists or mine.read_text() == ""


def test_a_recipe_of_an_analysis_takes_the_place_of_a_link(tmp_path: Path) -> None:
    """And a line break in a flag does not become a line of it."""
    mine = linked(tmp_path, SELECTION_FILE)
    write_selection_recipe(tmp_path, ["--task=word-problems", "--deepspeed", "a\nevil: 1"], [0.1, 0.3])
    assert mine.read_text() == "precious"
    assert set(yaml.safe_load((tmp_path / SELECTION_FILE).read_text())) == {"methods", "seeds", "against", "flags"}


class Runs:
    """A pickle that runs code when it is read."""

    def __reduce__(self) -> Any:
        return sys.exit, ("the file's code has run",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_nothing_of_a_checkpoint_runs(name: str, tiny_model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Nor is it said how to have it run."""
    arguments = [
        "train", "--model_name_or_path", str(tiny_model_folder), "--task=word-problems", "--num_train_problems=8",
        "--num_test_problems=0", "--use_cpu", "--bf16=false", "--save_steps=1", "--max_steps=2", "--output_dir",
        str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(arguments) == 0
    checkpoint = tmp_path / "run" / "checkpoint-1"
    torch.save(Runs(), checkpoint / name)
    (checkpoint / MANIFEST_FILE).unlink()
    assert main([*arguments, "--resume_from_checkpoint", str(checkpoint)]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    assert "a file is damaged, or runs code when it is read, which is refused" in line
    assert "weights_only" not in line
