"""What the lines of a history may hold. A stranger's file is read here: nothing of it may raise later on."""

from __future__ import annotations

import math
from typing import Any

from .damage import is_count, shown

__all__ = ["are_names", "find_wrong_field", "is_number"]


def find_wrong_field(event: Any) -> str | None:
    """What in a line of a history is of a type that no run writes, in words, or None.

    Fields that a line lacks are for the readers to ask for, and unknown ones are left alone.

    Args:
        event: the line's content.
    """
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return "it has no name under 'event'"
    fields = {"step": is_count, **FIELDS.get(event["event"], {})}
    wrong = next((name for name, is_right in fields.items() if name in event and not is_right(event[name])), None)
    if wrong is None and event["event"] == "log":
        wrong = next((name for name, value in event.items() if name != "event" and not is_number(value)), None)
    return wrong and f"{shown(wrong)} is {shown(event[wrong])}"


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, or null in the place of one that is not."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or (isinstance(value, int) and abs(value) < 1 << 63)


def are_numbers(value: Any) -> bool:
    """Whether a value is a list of such numbers."""
    if not isinstance(value, list):
        return False
    if set(map(type, value)) == {float}:  # Most are, and a history has millions.
        return all(map(math.isfinite, value))
    return all(map(is_number, value))


def are_layers(value: Any) -> bool:
    """Whether a value is a list of layers' indices."""
    if not isinstance(value, list):
        return False
    return not value or (set(map(type, value)) == {int} and is_count(min(value)) and is_count(max(value)))


def are_sets(value: Any) -> bool:
    """Whether a value is a list of sets of layers."""
    return isinstance(value, list) and all(map(are_layers, value))


def are_names(value: Any) -> bool:
    """Whether a value is a list of layers' names."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_mapping(value: Any) -> bool:
    """Whether a value is a JSON object."""
    return isinstance(value, dict)


def is_reason(value: Any) -> bool:
    """Whether a value is a text, or null."""
    return isinstance(value, str | None)


FIELDS = {
    "run": {"layers": are_names, "config": is_mapping, "versions": is_mapping},
    "step": {"active": are_layers},
    "importance": {
        "candidates": are_sets,
        "losses": are_numbers,
        "rewards": are_numbers,
        "importance": are_numbers,
        "skipped": is_reason,
    },
}
"""What each kind of line may hold in its fields."""
