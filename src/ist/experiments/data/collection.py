"""The tasks in files of the LLM-Adapters collection (Hu et al., 2023): `<folder>/<task>/train.json`, `test.json`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import read_rows
from .task_rows import TaskRow, make_row
from .tasks import Task

__all__ = ["find_file", "read_task", "solved_row"]

logger = logging.getLogger(__name__)

_FILES = {
    "train": ("train.json", "train.jsonl", "trainset.json"),
    "validation": ("validation.json", "valid.json", "dev.json", "validset.json"),
    "test": ("test.json", "test.jsonl", "sample.json"),
}
_SUBFOLDERS = ("", "commonsense", "math", "dataset")
_SCRATCH = re.compile(r"<<[^>]*>>")


def read_task(folder: str | Path, task: Task, split: str = "test") -> list[TaskRow]:
    """The rows of one split of a task.

    Args:
        folder: holds a folder for each task, maybe within `commonsense`, `math` or `dataset`.
        task: what to read.
        split: `train`, `validation` or `test`.

    Raises:
        ValueError: there is no such file, or a row does not fit.
    """
    file = find_file(folder, task, split)
    if file is None:
        raise ValueError(f"{folder} holds no {split} set of {task.name}: it belongs in {task.name}/{_FILES[split][0]}.")
    if file.stem == "sample":
        logger.warning("%s is a sample, not the whole test set of %s.", file, task.name)
    rows = []
    for number, row in enumerate(read_rows(file), start=1):
        try:
            rows.append(make_row(task, _collection_row(row)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}, row {number} {error}.") from error
    return rows


def find_file(folder: str | Path, task: Task, split: str) -> Path | None:
    """The file of a split, or None.

    Raises:
        ValueError: the split or the folder does not exist.
    """
    if split not in _FILES:
        raise ValueError(f"split={split!r} is unknown: choose one of {', '.join(_FILES)}.")
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder: --data_folder takes the one that holds boolq, gsm8k and so on.")
    candidates = (Path(folder) / part / task.name / name for part in _SUBFOLDERS for name in _FILES[split])
    return next((file for file in candidates if file.is_file()), None)


def _collection_row(row: Any) -> Mapping[str, Any]:
    """The collection's fields from its own rows, GSM8K's or MAWPS's."""
    if not isinstance(row, dict):
        raise TypeError(f"is a {type(row).__name__}, not an object")
    if "instruction" not in row and "question" in row:
        return solved_row(row)
    if "original_text" in row:
        return {"instruction": row["original_text"], "answer": str(row["ans"]).replace(",", "")}
    return row


def solved_row(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of GSM8K: the solution without its calculator's notes, its "#### 5" as a sentence."""
    solution, _, answer = str(row.get("answer", "")).rpartition("####")
    answer = answer.strip()
    output = f"{_SCRATCH.sub('', solution).strip()}\nThe answer is {answer}."
    return {"instruction": str(row["question"]), "output": output, "answer": answer.replace(",", "")}
