"""Parsers of flags whose errors are one line: what was typed, what is allowed, and the nearest name."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from .nearest import did_you_mean, unknown_flag

__all__ = ["OneLineParser", "check_commas", "check_first", "describe_allowed"]

KINDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", None: "a text"}


COMMAS = {"task", "tasks", "test_tasks", "labels"}
"""Flags whose values may have commas between them, or in them."""


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises ValueError with a message of one line, where argparse prints a page and exits."""

    help_command: str | None = None
    """What lists all flags; `PROGRAM --help` where it is None."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError, for what none of the methods below says, with the nearest flag where one is unknown."""
        help_command = self.help_command or f"{self.prog} --help"
        about, _, said = message.removeprefix("argument ").partition(": ")
        if about == "unrecognized arguments":
            raise unknown_flag((said.split() or [said])[0], self.flags(), help_command)
        if said.startswith("ignored explicit argument"):
            raise ValueError(f"{about.partition('/')[0]} takes no value: write the flag alone, or leave it out.")
        raise ValueError(f"{message}; `{help_command}` lists the flags.")

    def flags(self) -> set[str]:
        """Every flag without its dashes."""
        return {action.dest for action in self._actions if action.option_strings}

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.nargs in ("+", "*") and action.dest not in COMMAS:
            check_commas(shown(action), arg_strings)
        return super()._get_values(action, arg_strings)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            raise ValueError(f"{shown(action)} {arg_string} is not allowed: give {describe_kind(action)}.") from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            hint = did_you_mean(str(value), choices)
            raise ValueError(f"{shown(action)} {value} is unknown{hint}: give {describe_kind(action)}.")

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError:
            several = ", or several with spaces between them" if action.nargs == "+" else ""
            raise ValueError(f"{shown(action)} needs a value: give {describe_kind(action)}{several}.") from None


def check_commas(flag: str, values: Sequence[str]) -> None:
    """Raise ValueError where names have commas between them in place of spaces; expressions and files may have some."""
    for value in values:
        if re.fullmatch(r"[\w./-]+(,[\w./-]+)+,?", value) and not os.path.exists(value):
            parts = " ".join(part for part in value.split(",") if part)
            raise ValueError(f"{flag} {value} has commas, and several values have spaces between them: {flag} {parts}.")


def check_first(arguments: Sequence[str], command: str) -> None:
    """Raise ValueError where a command begins with a name in place of a flag: that of a recipe, or a model's folder."""
    if arguments and not arguments[0].startswith("-"):
        what, flag = ("model", "model_name_or_path") if os.path.isdir(arguments[0]) else ("recipe", "recipe")
        raise ValueError(
            f"{arguments[0]!r} belongs to no flag: a {what} is given as `ist {command} --{flag} {arguments[0]}`, and "
            f"`ist {command} --help` lists the other flags."
        )


def shown(action: argparse.Action) -> str:
    """A flag as it is typed, or the name of an argument without one."""
    return next((option for option in action.option_strings if option.startswith("--")), action.dest)


def describe_allowed(action: argparse.Action) -> str:
    """What a recipe may give a flag, in words."""
    return f"{describe_kind(action)}, or a list of such" if action.nargs == "+" else describe_kind(action)


def describe_kind(action: argparse.Action) -> str:
    """What one value of a flag is, in words."""
    if action.choices is not None:
        return f"one of {', '.join(map(str, action.choices))}"
    return KINDS.get(action.type, "true or false" if callable(action.type) and action.nargs != "+" else "a mapping")
