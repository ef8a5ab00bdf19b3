"""The second study of figure 2 as a recipe: tune only the k most, or the k least, important layers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...runs.files import write_whole
from ..compare.recipe import OWN_FLAGS, to_arguments
from ..printable import one_line
from ..recipes.files import find_recipe, read_recipe, split_recipe
from ..recipes.renamed import rename_keys
from ..recipes.safety import METRIC_KEYS, check_safe

__all__ = ["SELECTION_FILE", "write_selection_recipe"]

SELECTION_FILE = "tune-selected.yaml"
QUANTISED = ("load_in_4bit", "load_in_8bit")
"""Flags with which the model's own weights cannot train."""
FULL_RATE = 2e-5
"""Of full fine-tuning: `ist train`'s own, not the adapters' one."""
NOT_KEPT = OWN_FLAGS | METRIC_KEYS | {"method", "num_active_layers", "fixed_layers"}


def write_selection_recipe(folder: Path, arguments: Sequence[str], importance: Sequence[float]) -> str:
    """Write a recipe of `ist compare` beside an analysis: all layers, and the top and bottom 1, 2, 4, … by importance.

    Args:
        folder: of the analysed run.
        arguments: of `ist train` that the run was made with.
        importance: of each layer.

    Returns:
        The command that runs it, with the flags that no recipe may have, such as paths that lead elsewhere.
    """
    flags = {name: value for name, value in read_flags(arguments).items() if name not in NOT_KEPT}
    kept = {name: value for name, value in flags.items() if is_safe(name, value)}
    methods = selections(importance, full=not any(flags.get(name) for name in QUANTISED))
    file = folder / SELECTION_FILE
    left_out = to_arguments({name: value for name, value in flags.items() if name not in kept})
    command = shlex.join(["ist", "compare", "--recipe", str(file), *left_out])
    lines = [
        "# Figure 2b: tune only the most, or the least, important layers, as `ist analyse` found them",
        f"# {one_line(command)}",
        "# Where full fine-tuning does not fit into the memory, leave `full` out with --methods.",
        yaml.safe_dump({"methods": methods, "seeds": [0], "against": ["all"], "flags": kept}, sort_keys=False),
    ]
    write_whole(file, "\n".join(lines))
    return command


def selections(importance: Sequence[float], full: bool = True) -> dict[str, dict[str, Any]]:
    """The methods: all layers, the top and bottom k, for k that double up to half of the layers, and full fine-tuning.

    Full fine-tuning comes last, since it may not fit into the memory.
    """
    ranked = sorted(range(len(importance)), key=lambda layer: -importance[layer])
    counts = [count for power in range(10) if (count := 2**power) <= len(ranked) // 2]
    methods: dict[str, dict[str, Any]] = {"all": {"method": "peft"}}
    for name, order in (("top", ranked), ("bottom", ranked[::-1])):
        for count in counts:
            layers = ",".join(str(layer) for layer in sorted(order[:count]))
            methods[f"{name}-{count}"] = {"method": "fixed", "fixed_layers": layers, "num_active_layers": count}
    if full:
        methods["full"] = {"method": "full", "adapter": "none", "learning_rate": FULL_RATE}
    return methods


def read_flags(arguments: Sequence[str]) -> dict[str, Any]:
    """Flags by name from a command line, and from the recipe that it names, which they override."""
    recipe, _, rest = split_recipe(list(arguments))
    flags: dict[str, Any] = rename_keys(read_recipe(find_recipe(recipe)))[0] if recipe else {}
    given: dict[str, list[str]] = {}
    values: list[str] = []
    for argument in rest:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            values = given[name.replace("-", "_")] = [value] if equals else []
        else:
            values.append(argument)
    return {**flags, **{name: simplest(values) for name, values in given.items()}}


def simplest(values: list[str]) -> Any:
    """A flag's value: true where it stands alone, a text, or a list."""
    return True if not values else number_or_text(values[0]) if len(values) == 1 else values


def number_or_text(text: str) -> Any:
    """A number or a truth value from its text, as a reader of the recipe expects it; any other text as it is."""
    value = yaml.safe_load(text) if re.fullmatch(r"true|false|-?[0-9][0-9.eE+-]*", text) else text
    return value if isinstance(value, (int, float)) else text


def is_safe(name: str, value: Any) -> bool:
    """Whether a recipe may have this flag."""
    flag: Mapping[str, Any] = {name: value}
    try:
        check_safe(flag, SELECTION_FILE)
    except ValueError:
        return False
    return True
