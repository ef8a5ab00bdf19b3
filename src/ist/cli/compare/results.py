"""What a run of a comparison left in its folder, checked: a stranger may have written it, and nothing of it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...runs.files import read_object
from ...runs.history import HISTORY_FILE, read_history

__all__ = ["read_choices", "read_evaluation", "read_record", "read_result"]

MOST_UPDATES = 300
"""Importance updates of a run that `compare.json` keeps, evenly spread; the run's history has all."""

WAY_OUT = "remove its folder, and the run is made anew."


def read_record(file: Path) -> dict[str, Any]:
    """What a run was begun with.

    Raises:
        ValueError: the file is damaged.
    """
    return read_fields(file, {"arguments": lambda value: isinstance(value, list) and all(map(is_text, value))})


def read_result(file: Path) -> dict[str, Any]:
    """The result of `ist train`.

    Raises:
        ValueError: the file is damaged.
    """

    def is_log(value: Any) -> bool:
        needed = {"step", "step_seconds"}
        return isinstance(value, list) and all(are_figures(entry) and needed <= set(entry) for entry in value)

    found = read_fields(
        file,
        {
            "model": is_text,
            "before": are_figures,
            "after": are_figures,
            "num_steps": lambda value: is_figure(value) and value > 0,
            "step_seconds": lambda value: is_figure(value) and value > 0,
            "peak_memory_bytes": is_figure,
            "log": is_log,
        },
    )
    if not set(found["before"]) <= set(found["after"]):
        raise ValueError(f"{file} is damaged (it has other figures before than after): {WAY_OUT}")
    return found


def read_evaluation(file: Path) -> dict[str, Any]:
    """The result of `ist eval`.

    Raises:
        ValueError: the file is damaged.
    """

    def are_tasks(value: Any) -> bool:
        figures = ("accuracy", "loss", "score")
        return isinstance(value, Mapping) and all(
            isinstance(task, Mapping) and all(is_figure(task[name]) for name in figures if name in task)
            for task in value.values()
        )

    return read_fields(file, {"tasks": are_tasks})


def read_choices(folder: Path) -> dict[str, Any]:
    """How often each layer was trained, and what was learned of it, from a run's history; nothing without one.

    Raises:
        ValueError: the history is damaged.
    """
    if not (folder / HISTORY_FILE).is_file():
        return {"choices": None, "importance": None}
    events = read_history(folder)
    num_layers = next((len(event.get("layers", ())) for event in events if event["event"] == "run"), 0)
    updates = [event for event in events if event["event"] == "importance"]
    steps = [event.get("active", [num_layers]) for event in events if event["event"] == "step"]
    whole = all(
        "step" in update and len(scores := update.get("importance", ())) == num_layers and None not in scores
        for update in updates
    )
    if not (num_layers and whole and all(max(active, default=0) < num_layers for active in steps)):
        raise ValueError(f"{folder / HISTORY_FILE} is damaged: its lines do not fit together.")
    updates = updates[:: math.ceil(len(updates) / MOST_UPDATES) or 1]
    importance = {
        "steps": [update["step"] for update in updates],
        "scores": [update["importance"] for update in updates],
    }
    return {
        "choices": [sum(layer in active for active in steps) for layer in range(num_layers)],
        "importance": importance if updates else None,
    }


def read_fields(file: Path, checks: Mapping[str, Callable[[Any], bool]]) -> dict[str, Any]:
    """A JSON object with fields that hold what they should.

    Raises:
        ValueError: it is none; the message names the file and the field.
    """
    found = read_object(file, WAY_OUT)
    wrong = next((name for name, is_right in checks.items() if not is_right(found.get(name))), None)
    if wrong:
        raise ValueError(f"{file} is damaged (its {wrong!r} is not what a run writes): {WAY_OUT}")
    return found


def is_text(value: Any) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


def is_figure(value: Any) -> bool:
    """Whether a value is a number, NaN among them; integers that no machine computes with are none."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63)


def are_figures(value: Any) -> bool:
    """Whether a value names numbers."""
    return isinstance(value, Mapping) and all(map(is_figure, value.values()))
