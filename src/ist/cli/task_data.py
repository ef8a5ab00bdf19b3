"""The paper's tasks for `ist train` and `ist eval`: from a folder or from the hub, without what is tested on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ..experiments.data import TaskRow, find_tasks, load_hub_task, read_task, without_contamination
from ..experiments.data.collection import find_file
from ..experiments.data.tasks import Task

__all__ = ["load_task", "training_rows", "without_test_rows"]

logger = logging.getLogger(__name__)


def load_task(task: Task, split: str, data_folder: str | None, from_hub: bool) -> list[TaskRow]:
    """One split of a task.

    Raises:
        ValueError: neither a folder nor the hub is named, both are, or the task is not there.
    """
    if data_folder and from_hub:
        raise ValueError("--data_folder and --from_hub given: the tasks come from one of them.")
    if from_hub:
        return load_hub_task(task, split)
    if data_folder:
        return read_task(data_folder, task, split)
    raise ValueError(
        f"{task.name} does not come with this library: give --data_folder FOLDER with the tasks' files, or --from_hub."
    )


def training_rows(names: Sequence[str], data_folder: str | None, from_hub: bool) -> list[dict[str, str]]:
    """The training sets of tasks, joined in the order given, as TRL takes them.

    Raises:
        ValueError: a training set is not there, or a row does not fit.
    """
    return [
        row.to_prompt_completion()
        for task in find_tasks(names)
        for row in load_task(task, "train", data_folder, from_hub)
    ]


def without_test_rows(
    rows: Sequence[dict[str, Any]], names: Sequence[str], data_folder: str | None, from_hub: bool
) -> list[dict[str, Any]]:
    """Training rows without those whose prompt is a test prompt of some tasks; says how many were left out.

    Args:
        rows: of `prompt` and `completion`; in a chat, what the user says counts.
        names: of tasks. One whose test set is not in the folder is passed over, and named.
        data_folder: the folder with the tasks' files.
        from_hub: take the test sets from the hub instead.

    Raises:
        ValueError: a task is unknown, or nothing is left to train on.
    """
    clean = list(rows)
    for task in find_tasks(names):
        if not from_hub and data_folder and find_file(data_folder, task, "test") is None:
            logger.warning("%s holds no test set of %s: its rows are not looked for.", data_folder, task.name)
            continue
        test = load_task(task, "test", data_folder, from_hub)
        questions = [text for row in test for text in (row.prompt, row.question)]
        clean, count = without_contamination(clean, questions, _asked)
        if count:
            logger.warning("%d of %d training rows are test rows of %s: left out.", count, len(rows), task.name)
    if not clean:
        raise ValueError(f"All {len(rows)} training rows are test rows of {', '.join(names)}: train on other data.")
    return clean


def _asked(row: Mapping[str, Any]) -> str:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    return "".join(message["content"] for message in prompt if message["role"] == "user")
