"""What `ist compare` is told: methods, seeds, flags and evaluation, from a recipe and the command line."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import check_choice
from ..eval.arguments import evaluation_settings, known_eval_flags, parse_eval_arguments
from ..recipes.files import PREFIX, check_keys, list_comparisons, read_recipe
from ..recipes.renamed import rename_arguments, rename_keys, warn_of_old_names
from ..recipes.safety import COMMAND_LINE_ONLY, EVALUATION_KEYS, TRAINING_KEYS, check_safe
from ..train.arguments import known_flags, parse_arguments
from .equal_time import check_time_references, time_references

__all__ = [
    "BUDGETS",
    "OWN_FLAGS",
    "CompareRecipe",
    "Method",
    "find_comparison",
    "read_comparison",
    "to_arguments",
]

BUDGETS = ("steps", "seconds")
KEYS = {"methods", "seeds", "flags", "evaluation", "against", "learning_rates", "budget"}
OWN_FLAGS = {"output_dir", "seed", "resume_from_checkpoint", "recipe", "config", "max_train_seconds"}
"""Flags of `ist train` that a comparison gives to each run itself."""

OWN_EVALUATION = {"model_name_or_path", "adapter", "output_dir"}
"""Flags of `ist eval` that it gives itself."""


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    name: str
    flags: Mapping[str, Any]
    """Flags of `ist train`, those for all methods among them."""
    against: tuple[str, ...]
    """The methods that this one is paired with."""
    time_reference: str
    """The method whose seconds this one is given at equal time, see `time_references`; its own name where it is one."""
    learning_rates: tuple[float, ...] = ()
    """To choose from by validation loss; empty leaves the one of the flags."""

    @property
    def folder(self) -> str:
        """Name of the folder of its runs."""
        return re.sub(r"[^\w.+-]+", "-", self.name).strip("-")


@dataclass(frozen=True)
class CompareRecipe:
    """All that a comparison is made from."""

    name: str
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    budget: str = "steps"
    """`steps`: all methods at equal steps. `seconds`: then also for the seconds that their `time_reference` took."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """Flags of `ist eval`, which then judges each run; empty for the results of `ist train` alone."""
    more_flags: tuple[str, ...] = ()
    """Flags of `ist train` from the command line, which override the recipe's."""

    def pairs(self, budget: str = "steps") -> dict[str, list[str]]:
        """For each method those that it is paired with: at equal time the ones that have the seconds of the same method
        too, since no others train as long.
        """
        methods = {method.name: method for method in self.methods}
        return {
            name: [
                other
                for other in method.against
                if other in methods and (budget == "steps" or methods[other].time_reference == method.time_reference)
            ]
            for name, method in methods.items()
        }

    def arguments(self, method: Method, seed: int, folder: Path, changes: Mapping[str, Any] | None = None) -> list[str]:
        """The arguments of `ist train` for one run; a run that was cut off resumes from its last checkpoint."""
        own = {"seed": seed, "output_dir": str(folder), "resume_from_checkpoint": "auto", **(changes or {})}
        return [*to_arguments(method.flags), *self.more_flags, *to_arguments(own)]


def read_comparison(file: Path, more_flags: Sequence[str] = (), **changes: Any) -> CompareRecipe:
    """Read a recipe, and make sure that each of its trainings can be parsed.

    Args:
        file: the recipe.
        more_flags: flags of `ist train` that override it for all methods.
        changes: `seeds`, `methods` (names, for some of them only), `budget` and `evaluation` from the command line;
            None leaves what the recipe says. `trusted`: the recipe is the user's own.

    Raises:
        ValueError: a key, name or flag does not fit, or the recipe names code to run or paths outside of its folder.
    """
    recipe = rename_comparison(read_recipe(file), file.name)
    more_flags, said = rename_arguments(more_flags)
    warn_of_old_names("the command line", said)
    check_keys(file.name, recipe, KEYS)
    check_comparison_safe(recipe, file.name, changes.get("trusted", False))
    evaluation = read_evaluation(recipe, file.name, changes.get("evaluation") or {})
    seeds = changes.get("seeds") or recipe.get("seeds", [0])
    comparison = CompareRecipe(
        name=file.stem.removeprefix(PREFIX),
        methods=read_methods(recipe, file.name, changes.get("methods")),
        seeds=check_seeds(seeds),
        budget=changes.get("budget") or recipe.get("budget", "steps"),
        evaluation=evaluation,
        more_flags=tuple(more_flags),
    )
    check_choice("budget", comparison.budget, BUDGETS)
    if comparison.budget == "seconds":
        timed = {method.name: method.time_reference for method in comparison.methods}
        check_time_references(timed, comparison.pairs())
    for method in comparison.methods:
        try:
            run = parse_arguments(comparison.arguments(method, max(comparison.seeds), Path("runs")))
        except ValueError as error:
            raise ValueError(f"method {method.name!r}: {error}") from error
        if run.training.n_gpu > 1:
            raise ValueError(f"{run.training.n_gpu} GPUs are seen by one process: set CUDA_VISIBLE_DEVICES=0.")
    return comparison


def rename_comparison(recipe: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A recipe whose flags have their present names; one line of the log says which were renamed."""
    renamed, said = dict(recipe), []
    parts: list[tuple[dict[str, Any], Any]] = [(renamed, "flags")]
    if isinstance(recipe.get("methods"), Mapping):
        renamed["methods"] = dict(recipe["methods"])
        parts += [(renamed["methods"], name) for name in renamed["methods"]]
    for holder, key in parts:
        if isinstance(holder.get(key), Mapping):
            holder[key], old = rename_keys(holder[key])
            said += old
    warn_of_old_names(where, said)
    return renamed


def check_comparison_safe(recipe: Mapping[str, Any], where: str, trusted: bool) -> None:
    """Raise ValueError where a comparison sets what no recipe can, or anybody's recipe cannot."""
    methods = recipe.get("methods")
    own = OWN_FLAGS | {"against", "learning_rates"}
    flags = {*known_flags(), *own, *COMMAND_LINE_ONLY}
    for part in (recipe.get("flags"), *(methods.values() if isinstance(methods, Mapping) else ())):
        if isinstance(part, Mapping):
            check_keys(where, part, flags)
            check_safe({key: part[key] for key in part if key not in own}, where, TRAINING_KEYS, trusted)
    evaluation = recipe.get("evaluation")
    if isinstance(evaluation, Mapping):
        check_keys(f"{where}, evaluation:", evaluation, {*known_eval_flags(), *OWN_EVALUATION, *COMMAND_LINE_ONLY})
        flags = {key: evaluation[key] for key in evaluation if key not in OWN_EVALUATION}
        check_safe(flags, where, EVALUATION_KEYS, trusted)


def read_evaluation(recipe: Mapping[str, Any], where: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of `ist eval`, those of the command line over the recipe's."""
    given = recipe.get("evaluation") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"evaluation={given!r} in {where} is no list of flags: write `tasks: [boolq]` below it.")
    evaluation = {**given, **changes}
    if own := OWN_EVALUATION & set(evaluation):
        raise ValueError(f"The evaluation sets {own.pop()}, which ist compare gives to each run itself: leave it out.")
    if evaluation:
        try:
            evaluation_settings(evaluation_flags(evaluation))
        except ValueError as error:
            raise ValueError(f"evaluation: {error}") from error
    return evaluation


def evaluation_flags(evaluation: Mapping[str, Any]) -> argparse.Namespace:
    """The flags of `ist eval`, parsed, for a model that is not trained yet."""
    return parse_eval_arguments(to_arguments({"model_name_or_path": "model", **evaluation}))


def read_methods(recipe: Mapping[str, Any], where: str, chosen: Sequence[str] | None) -> tuple[Method, ...]:
    """The methods of a recipe, or those of them that the command line names."""
    entries, common = recipe.get("methods"), recipe.get("flags") or {}
    whole = isinstance(entries, Mapping) and isinstance(common, Mapping)
    if not whole or not entries or not all(entry is None or isinstance(entry, Mapping) for entry in entries.values()):
        raise ValueError(f"{where} needs `methods:`, a name for each with the flags of `ist train` that make it so.")
    for name in chosen or ():
        check_choice("methods", name, list(entries))
    flags = {str(name): {**common, **(entry or {})} for name, entry in entries.items()}
    rivals = {name: entry.pop("against", None) for name, entry in flags.items()}
    grids = {name: entry.pop("learning_rates", None) for name, entry in flags.items()}
    usual = recipe.get("against")
    if usual is None:
        usual = [name for name, entry in flags.items() if entry.get("method") in ("peft", "random")]
    methods, paired = [], {}
    for name, entry in flags.items():
        if own := OWN_FLAGS & set(entry):
            raise ValueError(f"{where} sets {own.pop()}, which ist compare gives to each run itself: leave it out.")
        against = usual if rivals[name] is None else rivals[name]
        against = against if isinstance(against, list) else [against]
        for other in against:
            check_choice(f"against of {name}", other, list(flags))
        paired[name] = tuple(against)
    timed = time_references({name: others[0] if others else name for name, others in paired.items()})
    for name, entry in flags.items():
        grid = recipe.get("learning_rates") if grids[name] is None else grids[name]
        others = tuple(other for other in paired[name] if other != name)
        methods.append(Method(name, entry, others, timed[name], check_rates(grid)))
    folders = [method.folder for method in methods]
    if nameless := next((method for method in methods if not re.match(r"\w.{,99}$", method.folder)), None):
        raise ValueError(
            f"{where} names a method {nameless.name[:100]!r}: begin it with a letter or a digit, and take up to 100 "
            "signs."
        )
    if len(set(folders)) < len(folders):
        raise ValueError(f"The methods of {where} have the same folder ({', '.join(folders)}): rename them.")
    return tuple(method for method in methods if not chosen or method.name in chosen)


def check_seeds(seeds: Any) -> tuple[int, ...]:
    """The seeds, each once."""
    given = seeds if isinstance(seeds, (list, tuple)) else [seeds]
    if not given or any(type(s) is not int or s < 0 for s in given) or len(set(given)) < len(given):
        raise ValueError(f"seeds={seeds!r} is not a list of different whole numbers: write seeds: [0, 1, 2].")
    return tuple(given)


def check_rates(grid: Any) -> tuple[float, ...]:
    """The learning rates to choose from."""
    given: list[Any] = [] if grid is None else [*grid] if isinstance(grid, (list, tuple)) else [None]
    try:
        rates = tuple(math.nan if isinstance(rate, bool) else float(rate) for rate in given)
    except (TypeError, ValueError):
        rates = (math.nan,)
    if not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
        raise ValueError(f"learning_rates={grid!r} is not a list of different numbers above 0: write [1.0e-4, 2.0e-4].")
    return rates


def to_arguments(flags: Mapping[str, Any]) -> list[str]:
    """Flags as a command line has them; those without a value are left out."""
    arguments = []
    for name, value in flags.items():
        if isinstance(value, (list, tuple)):
            arguments += [f"--{name}", *map(str, value)]
        elif isinstance(value, (bool, Mapping)):
            arguments.append(f"--{name}={json.dumps(value)}")
        elif value is not None:
            arguments.append(f"--{name}={value}")
    return arguments


def find_comparison(name: str) -> Path:
    """The file of a comparison, given by its path or by the name of one that comes with the library.

    Raises:
        ValueError: there is no such file and no such name.
    """
    if Path(name).is_file():
        return Path(name)
    known = {file.stem.removeprefix(PREFIX): file for file in list_comparisons()}
    if name.removeprefix(PREFIX) not in known:
        raise ValueError(f"There is no comparison {name!r}: give a YAML file, or one of {', '.join(known)}.")
    return known[name.removeprefix(PREFIX)]
