"""A recipe may come from anybody: it sets hyperparameters, and neither runs code nor reaches out of its folder."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

__all__ = ["check_safe"]

COMMAND_LINE_ONLY = {
    "trust_remote_code": "runs code that comes with a model",
    "use_kernels": "runs code from a hub",
    "env": "changes the environment of this process",
    "deepspeed": "reads a file that names code",
    "fsdp_config": "may name a file outside of the run",
    "accelerator_config": "may name a file outside of the run",
    "push_to_hub": "publishes the run",
    "hub_model_id": "publishes the run",
    "hub_token": "is a secret",
    "hub_strategy": "publishes the run",
    "token": "is a secret",
}
"""Keys, also within other keys, that a recipe cannot have, and why."""


def check_safe(recipe: Mapping[str, Any], name: str) -> None:
    """Make sure that a recipe names no code to run and no path outside of the folder that it is used in.

    Args:
        recipe: its keys and values.
        name: of the file, for the message.

    Raises:
        ValueError: it does; the message says which key, and to give it on the command line.
    """
    for key, value in entries(recipe):
        if key in COMMAND_LINE_ONLY:
            raise ValueError(
                f"{name} sets {key}, which {COMMAND_LINE_ONLY[key]}: a recipe cannot, give it on the command line as "
                f"--{key}."
            )
        if key == "attn_implementation" and isinstance(value, str) and "/" in value:
            raise ValueError(
                f"{name} sets {key} to {value!r}, which runs code from a hub: a recipe cannot, give it on the command "
                f"line as --{key}."
            )
        if isinstance(value, str) and leaves_folder(value):
            raise ValueError(
                f"{name} sets {key} to {value!r}: paths in a recipe are relative and without `..`; give this one on "
                f"the command line as --{key}."
            )


def entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth; a text that is JSON counts as what it means."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield str(name), item
            yield from entries(item, str(name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield key, item
            yield from entries(item, key)


def leaves_folder(text: str) -> bool:
    """Whether a text, read as a path or an address, leads out of the folder that it is used in."""
    text = re.sub(r"^(top|bottom):", "", text)  # a file of importance, in --fixed_layers
    outside = text.startswith("~") or "://" in text
    paths = PurePosixPath(text), PureWindowsPath(text)
    return outside or any(path.is_absolute() or path.anchor or ".." in path.parts for path in paths)
