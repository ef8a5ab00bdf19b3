"""The functions of the user's own that mark the runs of a comparison: all runs are marked by one version of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...experiments.evaluation.metrics import UserMetric, metric_identity
from ..metric import load_metric
from ..train.arguments import parse_arguments
from .recipe import CompareRecipe

__all__ = ["check_version", "functions_of"]


def functions_of(recipe: CompareRecipe) -> dict[str, UserMetric]:
    """The functions of `--metric_function`, by `train` and `eval`, imported before anything is trained.

    Raises:
        ValueError: one cannot be.
    """
    training = parse_arguments(recipe.arguments(recipe.methods[0], recipe.seeds[0], Path("runs"))).ist.metric_function
    named = {"train": training, "eval": recipe.evaluation.get("metric_function")}
    return {command: load_metric(name) for command, name in named.items() if name}


def check_version(metric: UserMetric | None, result: Mapping[str, Any], folder: Path) -> None:
    """Make sure that a finished run was marked by the function as it is now.

    Args:
        metric: the function; None where there is none.
        result: what the run says of its marks, as `metric_identity` made it.
        folder: of the run, for the message.

    Raises:
        ValueError: it was marked by another version.
    """
    if metric is not None and result.get("metric") != metric_identity("exact_match", (), metric)["metric"]:
        raise ValueError(
            f"{folder} was marked by another version of {metric.name}: give another --output_dir, or remove that "
            "folder."
        )
