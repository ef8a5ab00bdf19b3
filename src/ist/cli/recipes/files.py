"""The files of recipes: those that come with the library, how one is named, found and read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..nearest import did_you_mean, nearest

__all__ = [
    "QUICKSTART_RECIPE",
    "check_keys",
    "find_recipe",
    "flag_names",
    "list_comparisons",
    "list_recipes",
    "read_recipe",
    "run_name",
    "split_recipe",
]

QUICKSTART_RECIPE = "quickstart"
PREFIX = "compare-"
"""Of the names of recipes for `ist compare`."""
MOST_BYTES, MOST_VALUES, MOST_LEVELS, MOST_DIGITS = 100_000, 10_000, 20, 40
"""Of any recipe: bytes of its file, values with aliases written out, levels, and characters of a number."""

NUMBER_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))
RECIPE_FOLDERS = (Path(__file__).parents[2] / "recipes", Path(__file__).parents[4] / "recipes")
"""In an installed package, and in a clone."""


def split_recipe(arguments: list[str]) -> tuple[str | None, bool, list[str]]:
    """The recipe among the arguments (without a model and data the quickstart), its trust, and the other arguments."""
    splitter = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    splitter.add_argument("--recipe", "--config", dest="recipe")
    splitter.add_argument("--trust_recipe", "--trust-recipe", action="store_true")
    try:
        known, rest = splitter.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        if "--trust_recipe" in str(error):
            raise ValueError("--trust_recipe takes no value: leave it out to trust no recipe.") from None
        raise ValueError("--recipe needs a name or a file: `ist recipes` lists the names.") from None
    named = set(flag_names(rest))
    if known.recipe is None and not named & {"model_name_or_path", "task", "data_files", "dataset_name"}:
        return QUICKSTART_RECIPE, known.trust_recipe, rest
    return known.recipe, known.trust_recipe, rest


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
        if file.parent == folder and file.is_file() and not name.startswith(PREFIX):
            return file
    raise missing_recipe(name)


def missing_recipe(name: str) -> ValueError:
    """The error for a recipe that is not there: what was meant, and all that there are."""
    trainings = [file.stem for file in list_recipes()]
    comparisons = {file.stem.removeprefix(PREFIX) for file in list_comparisons()}
    other = ", it is one of `ist compare`" if name.removeprefix(PREFIX) in comparisons else ""
    return ValueError(
        f"There is no recipe {name!r}{did_you_mean(name, trainings)}{other}: give the path of a YAML file, or one of "
        f"{', '.join(trainings)} (`ist recipes` describes them)."
    )


def list_recipes() -> list[Path]:
    """The recipes that come with the library; those of `ist compare` are other ones."""
    files = [file for folder in RECIPE_FOLDERS for file in folder.glob("*.yaml") if PREFIX not in file.name]
    return sorted({file.stem: file for file in files}.values(), key=lambda file: file.stem)


def run_name(file: Path) -> str:
    """The name of the runs of a recipe; a file elsewhere never has the name, and so the folder, of one of ours."""
    name = re.sub(r"[^\w.+-]+", "-", file.stem).strip("-.") or "recipe"
    ours = any(file.parent == folder for folder in RECIPE_FOLDERS)
    return f"{name}-file" if not ours and name in {recipe.stem for recipe in list_recipes()} else name


class BoundedLoader(yaml.SafeLoader):
    """YAML without types of its own, which stops where it nests too deep: each further level takes longer to read."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Raises: RecursionError, with twice the levels that a recipe has."""
        if self.depth > 2 * MOST_LEVELS:
            raise RecursionError
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def read_recipe(file: Path) -> dict[str, Any]:
    """The keys and values of a recipe; its size, depth, numbers and repetitions are bounded.

    Raises:
        ValueError: it is not YAML, or no list of keys and values, or larger than a recipe can be.
    """
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes: a recipe has at most {MOST_BYTES}.")
    try:
        loader = BoundedLoader(file.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is not None:
            check_nodes(root, file)
        recipe = loader.construct_document(root) if root is not None else None
    except RecursionError:
        raise ValueError(f"{file} nests too deep: a recipe has at most {MOST_LEVELS} levels.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{file} is not YAML{where}: a recipe is a list of `key: value` lines.") from error
    except (ValueError, OverflowError) as error:
        if str(error).startswith(str(file)):
            raise
        raise ValueError(f"{file} holds a value that cannot be read: {error}.") from error
    if not isinstance(recipe, dict) or not all(isinstance(key, str) for key in recipe):
        raise ValueError(f"{file} holds no `key: value` lines: a recipe gives a value to flags of `ist train`.")
    return recipe


def check_nodes(root: yaml.Node, file: Path) -> None:
    """Raise ValueError where the values of a recipe, with every alias written out, are more than a recipe has."""
    sizes: dict[int, tuple[int, int]] = {}
    above: set[int] = set()

    def measure(node: yaml.Node) -> tuple[int, int]:
        """Values and levels of a node; each node is measured once, however often it is named."""
        line = node.start_mark.line + 1
        if id(node) in above:
            raise ValueError(f"{file} holds a value that contains itself in line {line}: write it out.")
        if id(node) in sizes:
            return sizes[id(node)]
        above.add(id(node))
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
            check_named_once([key for key, _ in node.value], file)
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        elif node.tag in NUMBER_TAGS and len(node.value) > MOST_DIGITS:
            raise ValueError(f"{file} has a number of {len(node.value)} characters in line {line}: shorten it.")
        measured = [measure(child) for child in children]
        above.discard(id(node))
        size, levels = 1 + sum(size for size, _ in measured), 1 + max((depth for _, depth in measured), default=0)
        if size > MOST_VALUES:
            raise ValueError(
                f"{file} holds more than {MOST_VALUES} values in line {line}: it repeats an alias too often."
            )
        if levels > MOST_LEVELS:
            raise ValueError(f"{file} nests too deep in line {line}: a recipe has at most {MOST_LEVELS} levels.")
        sizes[id(node)] = size, levels
        return size, levels

    measure(root)


def check_named_once(keys: Sequence[yaml.Node], file: Path) -> None:
    """Raise ValueError at a key that comes twice, of which YAML would take the last one."""
    first: dict[str, int] = {}
    for key in keys:
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in first:
                raise ValueError(
                    f"{file} sets {key.value!r} in line {first[key.value]} and again in line {line}: keep one."
                )
            first[key.value] = line


def list_comparisons() -> list[Path]:
    """The comparisons that come with the library."""
    files = [file for folder in RECIPE_FOLDERS for file in folder.glob(f"{PREFIX}*.yaml")]
    return sorted({file.stem: file for file in files}.values(), key=lambda file: (len(file.stem), file.stem))


def check_keys(where: str, keys: Any, allowed: set[str]) -> None:
    """Raise ValueError at a key that is no flag, naming the nearest one."""
    for key in keys:
        if key not in allowed:
            near = nearest(str(key), allowed)
            hint = f"did you mean {near!r}?" if near else "`ist train --help-all` lists the flags."
            raise ValueError(f"{where} has the unknown key {key!r}: {hint}")
