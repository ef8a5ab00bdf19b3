"""From the runs of a comparison to its table: means, deviations, and differences paired over seeds.

A run is a mapping with `method`, `seed`, `budget` and `figures`, as `compare.json` holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .statistics import deviation, mean, paired_difference

__all__ = ["best_rate", "figures_of", "is_share", "pair", "steps_in_time", "tabulate"]

Run = Mapping[str, Any]

NAMES = {
    "loss": "validation loss",
    "accuracy": "exact match",
    "exact_match": "exact match",
    "label_accuracy": "label accuracy",
}
"""Of the figures of `ist train`; the score of a user's function has its own."""


def figures_of(result: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None) -> dict[str, float]:
    """What a run is compared by.

    Args:
        result: of `ist train`; its figures after training are the validation loss and those of a metric.
        evaluation: of `ist eval`; each task gives its accuracy, its score or its loss, and two accuracies or more their
            mean as `average`.
    """
    figures: dict[str, float] = {NAMES.get(name) or name: value for name, value in result["after"].items()}
    tasks = (evaluation or {}).get("tasks", {})
    accuracies = {name: task["accuracy"] for name, task in tasks.items() if "accuracy" in task}
    figures.update(accuracies)
    figures.update({f"{name} loss": task["loss"] for name, task in tasks.items() if "loss" in task})
    figures.update({f"{name} score": task["score"] for name, task in tasks.items() if "score" in task})
    if len(accuracies) > 1:
        figures["average"] = mean(list(accuracies.values()))
    return figures


def is_share(figure: str) -> bool:
    """Whether a figure is a share of answers: neither a loss nor the score of a user's function."""
    return not figure.endswith(("loss", " score"))


def tabulate(runs: Sequence[Run], against: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """The table of the runs of one budget, by figure and method.

    Args:
        runs: finished ones, of one budget.
        against: for each method, in the order of the table, those that it is paired with.

    Returns:
        `{figure: {method: {"values", "mean", "deviation", "differences"}}}`, where `values` are by seed and
        `differences` are by the other method: mean, 95% interval and number of pairs, over the seeds that both have.
    """
    figures = list(dict.fromkeys(name for run in runs for name in run["figures"]))
    table: dict[str, dict[str, Any]] = {}
    for figure in figures:
        values = {method: values_by_seed(runs, method, figure) for method in against}
        table[figure] = {
            method: {
                "values": {str(seed): value for seed, value in own.items()},
                "mean": mean(list(own.values())),
                "deviation": deviation(list(own.values())),
                "differences": {other: pair(own, values[other]) for other in others if set(own) & set(values[other])},
            }
            for method, others in against.items()
            if (own := values[method])
        }
    return table


def values_by_seed(runs: Sequence[Run], method: str, figure: str) -> dict[int, float]:
    """A method's figure for each seed that was run."""
    return {run["seed"]: run["figures"][figure] for run in runs if run["method"] == method and figure in run["figures"]}


def pair(own: Mapping[int, float], other: Mapping[int, float]) -> dict[str, Any]:
    """The difference over the seeds that both have."""
    seeds = [seed for seed in own if seed in other]
    return asdict(paired_difference([own[seed] for seed in seeds], [other[seed] for seed in seeds]))


def best_rate(losses: Mapping[float, float]) -> float:
    """The learning rate with the lowest validation loss; the lower rate of two that are equal."""
    return min(sorted(losses), key=lambda rate: (losses[rate] != losses[rate], losses[rate]))


def steps_in_time(seconds: float, runs: Sequence[Run]) -> int:
    """How many steps a method does in these seconds, by the speed that its runs had; at least one.

    Args:
        seconds: of training.
        runs: of the method, with `step_seconds` and `num_steps`.
    """
    speed = sum(run["num_steps"] for run in runs) / sum(run["step_seconds"] for run in runs)
    return max(1, round(seconds * speed))
