"""`ist compare`: methods × seeds on one task set, one training after the other, and a table of what differs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ...experiments.comparison import best_rate, figures_of, steps_in_time, tabulate
from ...runs.files import write_json
from ..checkout import commit
from ..eval.command import load_tasks
from ..parsing import OneLineParser, check_first
from ..quiet import quiet_libraries
from ..train.folder import write_error
from .display import CompareDisplay
from .metric import check_version, functions_of
from .recipe import (
    BUDGETS,
    CompareRecipe,
    Method,
    evaluation_flags,
    find_comparison,
    read_comparison,
    to_arguments,
)
from .results import read_choices
from .runs import evaluate_once, train_once

__all__ = ["COMPARE_FILE", "compare"]

COMPARE_FILE = "compare.json"
KEPT = (
    "adapter", "device", "num_processes", "versions", "commit", "num_steps", "train_loss", "train_seconds",
    "step_seconds", "peak_memory_bytes", "probe_share", "search", "fused", "before", "after", "metric", "log",
)  # fmt: skip
"""What `compare.json` takes over from a run's result."""

USAGE = "ist compare [--recipe NAME_OR_FILE] [--output_dir FOLDER] [--seeds 0 1 …] [--methods NAME …] [--FLAG VALUE …]"


def compare(arguments: Sequence[str]) -> dict[str, Any]:
    """Train and judge every method with every seed; runs that are done are not run again.

    Returns:
        What is in `compare.json`.

    Raises:
        ValueError: the recipe does not fit, a run failed, or the folder holds runs with other flags.
    """
    quiet_libraries()
    check_first(arguments, "compare")
    options, more_flags = parse_options(arguments)
    changes = {name: getattr(options, name) for name in ("seeds", "methods", "budget")}
    changes["trusted"] = options.trust_recipe
    changes["evaluation"] = dict(read_pair(text) for text in options.evaluation)
    recipe = read_comparison(find_comparison(options.recipe), more_flags, **changes)
    folder = Path(options.output_dir or f"runs/compare-{recipe.name}")
    comparison = Comparison(recipe, folder)
    if not (folder / COMPARE_FILE).is_file():  # What is judged already needs no data.
        check_evaluation_data(recipe)
    comparison.run()
    return comparison.summary()


def check_evaluation_data(recipe: CompareRecipe) -> None:
    """Raise ValueError, before anything is trained, where the data that the runs are judged on cannot be read."""
    if not recipe.evaluation:
        return
    flags = evaluation_flags(recipe.evaluation)
    if flags.protocol == "lm-eval" or flags.from_hub:
        return
    try:
        load_tasks(flags)
    except (OSError, ValueError) as error:
        raise ValueError(f"evaluation: {error}") from error


def parse_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of `ist compare`, and what is left for `ist train`."""
    parser = OneLineParser(
        prog="ist compare",
        usage=USAGE,
        description="Every other flag is one of `ist train`, for all methods.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", default="quick", help="a YAML file, or a name that `ist recipes` lists")
    parser.add_argument("--trust_recipe", action="store_true", help="the recipe is your own: it may set paths as well")
    parser.add_argument("--output_dir", help="the comparison's folder; runs/compare-NAME without it")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the recipe's")
    parser.add_argument("--methods", nargs="+", help="some of the recipe's methods only")
    parser.add_argument("--budget", choices=BUDGETS, help="seconds: compare at equal training time as well")
    parser.add_argument(
        "--evaluation", nargs="+", default=[], metavar="FLAG=VALUE", help="flags of `ist eval`, beside the recipe's"
    )
    return parser.parse_known_args(arguments)


def read_pair(text: str) -> tuple[str, Any]:
    """A flag of `ist eval` from `name=value`."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--evaluation {text}: write it as name=value, such as --evaluation data_folder=data.")
    return name, yaml.safe_load(value)


class Comparison:
    """A recipe being run in a folder; what is done is in `compare.json` at any time."""

    def __init__(self, recipe: CompareRecipe, folder: Path) -> None:
        self.recipe = recipe
        self.folder = folder
        self.display = CompareDisplay()
        self.functions = functions_of(recipe)
        self.runs: list[dict[str, Any]] = []
        self.rates: dict[str, dict[str, Any]] = {}

    def run(self) -> None:
        """All runs, the table and the pictures.

        Raises:
            ValueError: a run failed, the folder cannot be written, or another process compares in it.
        """
        from filelock import FileLock, Timeout  # a requirement of torch

        if error := write_error(self.folder):
            raise error
        try:
            with FileLock(self.folder / ".compare.lock", timeout=0):
                self.run_all()
        except Timeout:
            raise ValueError(f"Another ist compare runs in {self.folder}: give another --output_dir.") from None

    def run_all(self) -> None:
        """What `run` does in a folder of its own."""
        recipe = self.recipe
        self.display.begin(recipe, self.folder)
        for method in recipe.methods:
            if method.learning_rates:
                self.choose_rate(method)
        for seed in recipe.seeds:
            for method in recipe.methods:
                self.keep(self.one(method, seed, rate=self.rates.get(method.name, {}).get("chosen")))
        if recipe.budget == "seconds":
            for seed in recipe.seeds:
                for method in recipe.methods:
                    self.keep(self.in_equal_time(method, seed))
        self.display.end(self.summary(), self.folder, self.draw())

    def choose_rate(self, method: Method) -> None:
        """Try the method's learning rates with the first seed, and take the one with the lowest validation loss."""
        losses = {}
        for rate in method.learning_rates:
            run = self.one(method, self.recipe.seeds[0], rate=rate)
            if "loss" not in run["after"]:
                raise ValueError(
                    f"{method.name!r} has learning rates to choose from and no validation data to do it on."
                )
            losses[rate] = run["after"]["loss"]
        chosen = best_rate(losses)
        edge = len(losses) > 1 and chosen in (min(losses), max(losses))
        tried = {f"{rate:g}": loss for rate, loss in losses.items()}
        self.rates[method.name] = {"tried": tried, "chosen": chosen, "at_the_edge": edge}
        self.display.chosen(method.name, self.rates[method.name])

    def in_equal_time(self, method: Method, seed: int) -> dict[str, Any]:
        """The method trained for the seconds that its reference took with this seed, by a schedule that fits them; the
        reference's own run at equal steps.
        """
        (base,) = self.find(method.time_reference, seed)
        if method.time_reference == method.name:
            return {**base, "budget": "seconds"}
        steps = steps_in_time(base["step_seconds"], self.find(method.name, seed))
        changes = {"max_steps": steps, "max_train_seconds": round(base["step_seconds"], 3)}
        return self.one(method, seed, self.rates.get(method.name, {}).get("chosen"), "seconds", changes)

    def one(
        self,
        method: Method,
        seed: int,
        rate: float | None = None,
        budget: str = "steps",
        changes: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One training with its evaluation."""
        parts = [method.folder, *([f"lr-{rate:g}"] if rate else []), *([budget] if budget != "steps" else [])]
        folder = self.folder.joinpath(*parts, f"seed-{seed}")
        changes = {**(changes or {}), **({"learning_rate": rate} if rate else {})}
        arguments = self.recipe.arguments(method, seed, folder, changes)
        with self.display.running(method.name, seed, rate, budget) as on_line:
            result = train_once(arguments, folder, on_line)
        check_version(self.functions.get("train"), result.get("metric") or {}, folder)
        run = {
            "method": method.name,
            "seed": seed,
            "budget": budget,
            "learning_rate": rate,
            "folder": folder.relative_to(self.folder).as_posix(),
            "arguments": arguments,
            **{name: result.get(name) for name in KEPT},
            **read_choices(folder),
        }
        run["evaluation"] = self.judge(method, result, folder) if self.recipe.evaluation else None
        run["figures"] = figures_of(result, run["evaluation"])
        self.display.done(run)
        return run

    def judge(self, method: Method, result: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The run's figures by `ist eval`."""
        has_adapter = (folder / "adapter_config.json").is_file()
        model = (
            {"model_name_or_path": result["model"], "adapter": folder}
            if has_adapter
            else {"model_name_or_path": folder}
        )
        arguments = to_arguments({**model, **self.recipe.evaluation, "output_dir": folder / "evaluation"})
        with self.display.running(method.name, None, None, "evaluation") as on_line:
            found = evaluate_once(arguments, folder / "evaluation", on_line)
        settings = found.get("settings")
        check_version(self.functions.get("eval"), settings if isinstance(settings, dict) else {}, folder / "evaluation")
        return found

    def keep(self, run: dict[str, Any]) -> None:
        """Take a run into the comparison, and write what there is."""
        self.runs.append(run)
        write_json(self.folder / COMPARE_FILE, self.summary())

    def find(self, method: str, seed: int | None = None) -> list[dict[str, Any]]:
        """The runs of a method at equal steps."""
        return [
            run
            for run in self.runs
            if run["method"] == method and run["budget"] == "steps" and seed in (None, run["seed"])
        ]

    def summary(self) -> dict[str, Any]:
        """What `compare.json` holds."""
        return {
            "recipe": self.recipe.name,
            "commit": commit(),
            "seeds": list(self.recipe.seeds),
            "methods": {method.name: dict(method.flags) for method in self.recipe.methods},
            "more_flags": list(self.recipe.more_flags),
            "against": self.recipe.pairs(),
            "evaluation": dict(self.recipe.evaluation),
            "learning_rates": self.rates,
            "table": {
                budget: tabulate([run for run in self.runs if run["budget"] == budget], self.recipe.pairs(budget))
                for budget in dict.fromkeys(run["budget"] for run in self.runs)
            },
            "runs": self.runs,
        }

    def draw(self) -> list[Path]:
        """The pictures, where matplotlib is there."""
        try:
            from ...experiments.report.comparison import draw_comparison
        except ImportError:
            return []
        return draw_comparison(self.summary(), self.folder)
