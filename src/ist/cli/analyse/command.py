"""`ist analyse`: which layers of a trained adapter matter, and whether IST learned it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import load_peft_weights

from ...adapters.layers import discover_layers
from ...experiments.analysis import (
    batch_weights,
    importance_intervals,
    loss_increases,
    losses_without,
    rank_correlation,
    removal_order,
    weighted_mean,
)
from ...experiments.evaluation import exact_answers
from ...probing.suppression import suppress
from ...runs.files import RESULT_FILE, write_json
from ...runs.history import HISTORY_FILE, read_history
from ..checkout import commit
from ..display import device_name
from ..loading import check_adapter_weights, whole
from ..parsing import OneLineParser
from ..quiet import quiet_libraries
from ..recipes.renamed import rename_arguments
from ..recipes.safety import without_authority
from ..train.arguments import parse_arguments
from ..train.command import make_trainer
from ..train.data import TaskData, load_data
from .display import AnalyseDisplay
from .progress import AnalysisProgress
from .recipe import write_selection_recipe

__all__ = ["ANALYSIS_FILE", "analyse"]

ANALYSIS_FILE = "analysis.json"
ORDERS = ("greedy", "importance")


def analyse(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure the layers of a run of `ist train` on its validation data.

    Returns:
        What is in `analysis.json`: `importance` is the list that `--fixed_layers top:FILE` reads.

    Raises:
        ValueError: the folder holds no finished run with an adapter, or its data is not available.
    """
    quiet_libraries()
    options, more_flags = parse_options(arguments)
    folder = Path(options.folder)
    command = [*read_command(folder), *more_flags, "--output_dir", str(folder)]
    run = parse_arguments(command, without_metric=True)
    data = load_data(run)
    if data.evaluation is None:
        raise ValueError("The run has no validation data to measure on: give some, such as --num_test_problems 100.")
    trainer = make_trainer(run, data)
    load_adapter(trainer.model, folder)
    analysis = Analysis(trainer, data, options)
    analysis.display.begin(folder, run, analysis)
    result = {
        "run": folder.name,
        "model": run.model.model_name_or_path,
        "method": run.ist.method,
        "device": device_name(),
        "versions": {name: version(name) for name in ("ist-peft", "torch", "transformers", "peft", "trl")},
        "commit": commit(),
        **analysis.measure(learned_importance(folder, len(analysis.layers))),
    }
    write_json(folder / ANALYSIS_FILE, result)
    further = write_selection_recipe(folder, command, result["importance"])
    analysis.display.end(result, folder, further, draw(result, folder))
    return result


def parse_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of `ist analyse`, and what is left for `ist train`."""
    parser = OneLineParser(
        prog="ist analyse",
        usage="ist analyse FOLDER [--FLAG VALUE …]",
        description="Measure which layers of a trained adapter matter, and whether IST learned it. Writes "
        "analysis.json, a picture and a recipe for `ist compare` into FOLDER. Every flag of `ist train` is taken as "
        "well, and goes over that of the run.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", nargs="?", help="the --output_dir of a finished run of `ist train`")
    parser.add_argument(
        "--order",
        choices=ORDERS,
        default="greedy",
        help="how layers are taken out: by a greedy search (the default), or by each one's own importance",
    )
    parser.add_argument(
        "--search_batches",
        type=int,
        default=2,
        metavar="N",
        help="validation batches of each greedy comparison (default: 2)",
    )
    parser.add_argument(
        "--num_batches", type=int, metavar="N", help="validation batches of everything else (default: all)"
    )
    parser.add_argument(
        "--num_problems",
        type=int,
        default=40,
        metavar="N",
        help="problems answered after each removal; 0 for none (default: 40)",
    )
    parser.add_argument(
        "--beta", type=float, default=0.0, metavar="X", help="factor on a layer that is suppressed (default: 0)"
    )
    options, more_flags = parser.parse_known_args(arguments)
    if options.folder is None:
        raise ValueError(
            "ist analyse takes a folder, that of a finished run of `ist train`: ist analyse runs/quickstart."
        )
    for name, least in (("search_batches", 1), ("num_batches", 1), ("num_problems", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value} is too few: give {least} or more.")
    if not 0 <= options.beta < 1:
        raise ValueError(f"--beta {options.beta} suppresses nothing: give a number from 0 to below 1.")
    return options, more_flags


def read_command(folder: Path) -> list[str]:
    """The arguments of `ist train` that a run was made with."""
    file = folder / RESULT_FILE
    if not file.is_file() or not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds no finished run with an adapter: give the --output_dir of a finished `ist train`."
        )
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): train the run anew.") from error
    if not isinstance(result, dict) or "arguments" not in result:
        raise ValueError(f"{file} does not say how the run was made: train it anew with this version.")
    return rename_arguments(without_authority(result["arguments"], str(file)))[0]


def load_adapter(model: Any, folder: Path) -> None:
    """Put the trained weights into a new adapter of the same kind.

    Raises:
        ValueError: they are damaged or not finite, or of another kind of adapter.
    """
    with whole(str(folder), "adapter"):
        check_adapter_weights(str(folder), load_peft_weights(str(folder), device="cpu"))
        loaded = model.load_adapter(str(folder), "default", is_trainable=True)
    if loaded.unexpected_keys:
        raise ValueError(f"The adapter in {folder} is of another kind than the run's flags make: give the run's flags.")


def learned_importance(folder: Path, num_layers: int) -> list[float] | None:
    """What IST learned of each layer, its scores after the last update; None for other methods.

    Raises:
        ValueError: they are not those of this model's layers.
    """
    if not (folder / HISTORY_FILE).is_file():
        return None
    events = read_history(folder)
    scores = [event["importance"] for event in events if event["event"] == "importance" and "importance" in event]
    if not scores or not any(scores[-1]):
        return None
    if len(scores[-1]) != num_layers or None in scores[-1]:
        raise ValueError(f"{folder / HISTORY_FILE} has not a score for each of the model's {num_layers} layers.")
    return scores[-1]


class Analysis:
    """The measurements of one trained model."""

    def __init__(self, trainer: Any, data: TaskData, options: argparse.Namespace) -> None:
        self.trainer = trainer
        self.model = trainer.model
        self.layers = discover_layers(self.model)
        self.batches = list(trainer.get_eval_dataloader())[: options.num_batches]
        self.weights = batch_weights(self.batches)
        self.problems = data.problems[: options.num_problems]
        self.options = options
        self.display = AnalyseDisplay()
        self.progress = AnalysisProgress(self.display.console, self.totals())

    def totals(self) -> dict[str, int]:
        """How much there is to measure: losses of a batch and a set of layers, and sets to answer problems with."""
        num, batches = len(self.layers), len(self.batches)
        greedy = (num * (num + 1) // 2 - 1) * min(self.options.search_batches, batches)
        losses = 3 * (num + 1) * batches + (2 * greedy if self.options.order == "greedy" else 0)
        return {"losses": losses, "answers": 2 * (num + 1) if self.problems else 0}

    def measure(self, learned: list[float] | None) -> dict[str, Any]:
        """True importance, its rank correlation with what was learned, and both removals."""
        start = time.perf_counter()
        indices = list(range(len(self.layers)))
        with self.progress.measuring(f"the loss without each of {len(indices)} layers"):
            losses = self.losses([[], *([index] for index in indices)])
        importance = loss_increases(losses, self.weights).tolist()
        removal = {
            name: self.remove(self.order(importance, most), name.replace("_", " "))
            for name, most in (("least_first", False), ("most_first", True))
        }
        return {
            "beta": self.options.beta,
            "num_batches": len(self.batches),
            "num_tokens": int(self.weights.sum()),
            "layers": [layer.name for layer in self.layers],
            "loss": float(weighted_mean(losses[:, 0], self.weights)),
            "importance": importance,
            "intervals": importance_intervals(losses, self.weights),
            "learned": learned,
            "rank_correlation": rank_correlation(losses, self.weights, learned) if learned else None,
            "order": self.options.order,
            "search_batches": self.options.search_batches if self.options.order == "greedy" else None,
            "num_problems": len(self.problems),
            "removal": removal,
            "seconds": time.perf_counter() - start,
        }

    def losses(self, removed: Sequence[Sequence[int]], num_batches: int | None = None) -> Any:
        """Losses `[batches, sets]` without these layers."""
        batches = self.progress.each(self.batches[:num_batches], "losses", parts=len(removed))
        return losses_without(self.model, self.layers, removed, batches, self.options.beta)

    def order(self, importance: list[float], most_first: bool) -> list[int]:
        """In which order the layers are taken out."""
        if self.options.order == "importance":
            return sorted(range(len(importance)), key=lambda layer: importance[layer], reverse=most_first)
        few = self.options.search_batches

        def measure(removed: list[list[int]]) -> list[float]:
            return weighted_mean(self.losses(removed, few), self.weights[:few]).tolist()

        with self.progress.measuring(f"greedy search, {'most' if most_first else 'least'} important first"):
            return removal_order(len(self.layers), measure, most_first)

    def remove(self, order: list[int], name: str) -> dict[str, Any]:
        """The loss, and the exact match, with 0, 1, 2, … layers taken out in this order."""
        taken = [order[:number] for number in range(len(order) + 1)]
        with self.progress.measuring(f"the loss after each removal, {name}"):
            losses = weighted_mean(self.losses(taken), self.weights).tolist()
        accuracy = []
        if self.problems:
            with self.progress.measuring(f"{len(self.problems)} problems after each removal, {name}"):
                accuracy = [self.accuracy(removed) for removed in self.progress.each(taken, "answers")]
        return {"order": order, "loss": losses, "accuracy": accuracy or None}

    def accuracy(self, removed: Sequence[int]) -> float:
        """The exact match without these layers."""
        kept = {layer.index for layer in self.layers} - set(removed)
        with suppress(self.layers, kept, self.options.beta):
            answers = exact_answers(self.model, self.trainer.processing_class, self.problems)
        return sum(answer.correct for answer in answers) / len(answers)


def draw(result: dict[str, Any], folder: Path) -> Path | None:
    """The picture, where matplotlib is there."""
    try:
        from ...experiments.report.analysis import draw_analysis
    except ImportError:
        return None
    return draw_analysis(result, folder)
