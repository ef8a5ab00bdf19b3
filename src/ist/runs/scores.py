"""Scores of layers read from a file, and the layers at either end of them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .events import are_names, is_number
from .history import HISTORY_FILE, read_history

__all__ = ["extreme_layers", "read_scores"]

SCORE_FIELDS = ("importance", "true_importance", "scores")


def extreme_layers(scores: Sequence[float], count: int, most: bool = True) -> tuple[int, ...]:
    """The `count` layers with the highest scores, or the lowest ones; of equal scores the layer nearer the input first.

    Returns:
        Layer indices in ascending order.
    """
    order = sorted(range(len(scores)), key=lambda index: -scores[index] if most else scores[index])
    return tuple(sorted(order[:count]))


def read_scores(file: str | os.PathLike[str], names: Sequence[str]) -> list[float]:
    """Read one score for each layer.

    Args:
        file: the history of a run (`ist_history.jsonl`, or the run's folder), whose last scores count; or a JSON file:
            a list of numbers, or an object that holds one as `importance`, `true_importance` or `scores`. Names of
            layers beside it, as `layers`, are compared with the model's.
        names: of the model's layers.

    Raises:
        ValueError: there is no such file, it holds no scores, or they are not those of this model's layers.
    """
    path = Path(file)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a JSON file of scores, or the history of a run.")
    is_history = path.is_dir() or path.suffix == Path(HISTORY_FILE).suffix
    scores, layers = history_scores(path) if is_history else json_scores(path)
    if layers is not None and [short_name(name) for name in layers] != [short_name(name) for name in names]:
        raise ValueError(
            f"{path} has the scores of {len(layers)} layers ({layers[0] if layers else 'none'}, …), and this model has "
            f"{len(names)} ({names[0]}, …): give those of the same model."
        )
    if len(scores) != len(names):
        raise ValueError(f"{path} has {len(scores)} scores, and this model has {len(names)} layers.")
    if None in scores or not all(map(is_number, scores)):
        raise ValueError(f"{path} has scores that are not finite numbers.")
    return [float(score) for score in scores]


def history_scores(path: Path) -> tuple[list[Any], list[str] | None]:
    """The last scores of a history, and the names of its layers."""
    events = read_history(path)
    learned = [event["importance"] for event in events if event["event"] == "importance" and "importance" in event]
    if not learned:
        raise ValueError(f"{path} holds no importance: its run measured nothing (yet).")
    layers = [event["layers"] for event in events if event["event"] == "run" and "layers" in event]
    return learned[-1], layers[-1] if layers else None


def json_scores(path: Path) -> tuple[list[Any], list[str] | None]:
    """The scores in a JSON file, and the names of its layers where it has them."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: give a list of scores, or the history of a run.") from error
    layers = content.get("layers") if isinstance(content, dict) else None
    if isinstance(content, dict):
        content = next((content[field] for field in SCORE_FIELDS if field in content), None)
    if not isinstance(content, list):
        raise ValueError(f"{path} holds no scores: a list of numbers, or an object with {' or '.join(SCORE_FIELDS)}.")
    return content, layers if are_names(layers) else None


def short_name(name: str) -> str:
    """The name of a block without what PEFT puts before it."""
    return name.removeprefix("base_model.model.")
