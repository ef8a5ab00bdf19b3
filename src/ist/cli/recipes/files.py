"""The files of recipes: those that come with the library, how one is named, found and read."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = [
    "QUICKSTART_RECIPE",
    "check_keys",
    "find_recipe",
    "flag_names",
    "list_comparisons",
    "list_recipes",
    "read_recipe",
    "split_recipe",
]

QUICKSTART_RECIPE = "quickstart"
PREFIX = "compare-"
"""Of the names of recipes for `ist compare`."""
RECIPE_FOLDERS = (Path(__file__).parents[2] / "recipes", Path(__file__).parents[4] / "recipes")
"""In an installed package, and in a clone."""


def split_recipe(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The recipe among the arguments, and the others; the quickstart where neither model nor data is named.

    `--help` shows the library's defaults, so no recipe goes with it.
    """
    splitter = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    splitter.add_argument("--recipe", "--config", dest="recipe")
    try:
        known, rest = splitter.parse_known_args(arguments)
    except argparse.ArgumentError:
        raise ValueError("--recipe needs a name or a file: `ist recipes` lists the names.") from None
    if {"-h", "--help"} & set(rest):
        return None, rest
    named = set(flag_names(rest))
    if known.recipe is None and not named & {"model_name_or_path", "task", "data_files", "dataset_name"}:
        return QUICKSTART_RECIPE, rest
    return known.recipe, rest


def flag_names(flags: Sequence[str]) -> list[str]:
    """The names of the flags on a command line, each once."""
    names = [flag.split("=")[0].lstrip("-").replace("-", "_") for flag in flags if flag.startswith("--")]
    return list(dict.fromkeys(name.removeprefix("no_") for name in names))


def find_recipe(name: str) -> Path:
    """The file of a recipe, given by its path or by the name of one that comes with the library.

    Raises:
        ValueError: there is no such file and no such name.
    """
    if Path(name).is_file():
        return Path(name)
    for folder in RECIPE_FOLDERS:
        file = folder / f"{name}.yaml"
        if file.parent == folder and file.is_file():
            return file
    raise ValueError(f"There is no recipe {name!r}: give a YAML file, or a name that `ist recipes` lists.")


def list_recipes() -> list[Path]:
    """The recipes that come with the library; those of `ist compare` are other ones."""
    files = [file for folder in RECIPE_FOLDERS for file in folder.glob("*.yaml") if PREFIX not in file.name]
    return sorted({file.stem: file for file in files}.values(), key=lambda file: file.stem)


def read_recipe(file: Path) -> dict[str, Any]:
    """The keys and values of a recipe."""
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{file} is not YAML{where}: a recipe is a list of `key: value` lines.") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{file} holds no `key: value` lines: a recipe gives a value to flags of `ist train`.")
    return recipe


def list_comparisons() -> list[Path]:
    """The comparisons that come with the library."""
    files = [file for folder in RECIPE_FOLDERS for file in folder.glob(f"{PREFIX}*.yaml")]
    return sorted({file.stem: file for file in files}.values(), key=lambda file: (len(file.stem), file.stem))


def check_keys(where: str, keys: Any, allowed: set[str]) -> None:
    """Raise ValueError at a key that is no flag, naming the nearest one."""
    for key in keys:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), sorted(allowed), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "`ist train --help` lists the flags."
            raise ValueError(f"{where} has the unknown key {key!r}: {hint}")
