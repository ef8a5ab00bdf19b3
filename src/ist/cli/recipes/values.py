"""Values of a recipe as their flags take them, so that a recipe and a command line mean the same."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin, get_type_hints

from ..parsing import describe_allowed

__all__ = ["convert_values"]


def convert_values(
    name: str, recipe: Mapping[str, Any], parser: argparse.ArgumentParser, dataclass_types: Iterable[type]
) -> dict[str, Any]:
    """Convert each value as the command line would.

    Args:
        name: of the recipe's file, for the message.
        recipe: its keys, all of them flags, and values.
        parser: of the command line.
        dataclass_types: what the flags were made from; they say where nothing, a list or a mapping is allowed.

    Raises:
        ValueError: a value is not allowed; the message says which, and what is.
    """
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # The first one: after it comes --no_….
    hints: dict[str, Any] = {}
    for dataclass_type in dataclass_types:
        hints |= get_type_hints(dataclass_type)
    return {
        key: convert_value(f"{name} sets {key} to", value, actions[key], hints.get(key, str))
        for key, value in recipe.items()
    }


def convert_value(what: str, value: Any, action: argparse.Action, hint: Any) -> Any:
    """One value as its flag takes it."""
    members = get_args(hint) or (hint,)
    kinds = {get_origin(member) or member for member in members}
    try:
        if value is None and type(None) in kinds:
            return None
        if value is None:
            raise ValueError
        if action.nargs == "+":
            items = value if isinstance(value, list) else [value]
            of_texts = any(str in get_args(member) for member in members)
            return [item if isinstance(item, dict) and not of_texts else convert_scalar(item, action) for item in items]
        if type(value) in kinds and action.choices is None:  # The flag itself may know but one of several types.
            return value
        return convert_scalar(value, action)
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        shown = "nothing" if value is None else repr(value)
        raise ValueError(f"{what} {shown}: give {describe_allowed(action)}.") from None


def convert_scalar(value: Any, action: argparse.Action) -> Any:
    """A value that is neither a list nor a mapping.

    Raises:
        ValueError: it is not allowed.
    """
    if value is None or isinstance(value, (list, dict)):
        raise ValueError
    if action.choices is not None and value is False and "no" in action.choices:
        value = "no"  # what YAML takes for false
    if action.type is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    convert: Any = action.type or str
    converted = convert(str(value))
    if action.choices is not None and converted not in action.choices:
        raise ValueError
    return converted
