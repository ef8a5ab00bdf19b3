"""Names that flags had once: accepted with one line of warning until version 0.2."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ...config import PRESETS, ISTConfig

__all__ = ["rename_arguments", "rename_keys", "warn_of_old_names"]

logger = logging.getLogger(__name__)

OPTIONS = {field.name for field in fields(ISTConfig)}
FLAGS = {old: new for old, new in {"damping": "suppression", "price": "cost_exponent"}.items() if new in OPTIONS}
"""Flags: the old name, and the present one."""

VALUES = {("method", "all"): "peft"} | ({("preset", "reference"): "authors"} if "authors" in PRESETS else {})
"""Values: the flag and the old value, and the present one."""


def rename_keys(flags: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Flags and values of a recipe under their present names.

    Returns:
        The flags, and a text such as `method: all is now method: peft` for each that was renamed.
    """
    renamed: dict[str, Any] = {}
    said = []
    for key, value in flags.items():
        name = FLAGS.get(key, key)
        new = VALUES.get((name, value), value) if isinstance(value, str) else value
        if name != key:
            said.append(f"{key} is now {name}")
        if new != value:
            said.append(f"{name}: {value} is now {name}: {new}")
        if name in renamed or (name != key and name in flags):
            raise ValueError(f"{key} is the old name of {name}, and both are given: leave {key} out.")
        renamed[name] = new
    return renamed, said


def rename_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The same for a command line: `--price 1`, `--price=1` and `--method all` among others.

    Returns:
        The arguments, and a text such as `--price is now --cost_exponent` for each that was renamed.
    """
    renamed: list[str] = []
    said = []
    flag = ""
    for argument in arguments:
        if argument.startswith("--"):
            old, equals, value = argument[2:].partition("=")
            flag = old.replace("-", "_")
            if flag in FLAGS:
                said.append(f"--{flag} is now --{FLAGS[flag]}")
                flag = old = FLAGS[flag]
            argument = f"--{old}{equals}{value}"
        else:
            old, equals, value = "", "", argument
        new = VALUES.get((flag, value))
        if new is not None:
            said.append(f"--{flag} {value} is now --{flag} {new}")
            argument = f"--{old}={new}" if equals else new
        renamed.append(argument)
    return renamed, said


def warn_of_old_names(where: str, said: Sequence[str]) -> None:
    """Log one line that names what was renamed, if anything was."""
    if said:
        logger.warning("%s: %s; the old names end with version 0.2.", where, ", ".join(dict.fromkeys(said)))
