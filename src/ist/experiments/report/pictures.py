"""One picture of a run: importance over time, which layers were trained, and the losses."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...runs.history import read_history

__all__ = ["PICTURE_FILE", "draw_report"]

PICTURE_FILE = "importance.png"


def draw_report(folder: str | os.PathLike[str]) -> Path:
    """Draw the run in `folder` from its history.

    Returns:
        The picture, `importance.png` in that folder.

    Raises:
        ValueError: the folder holds no history, or one without a step.
    """
    events = read_history(folder)
    steps = [event for event in events if event["event"] == "step"]
    updates = [event for event in events if event["event"] == "importance"]
    if not steps:
        raise ValueError(f"The history in {folder} has no steps: let the run do at least one.")
    run = next((event for event in events if event["event"] == "run"), None)
    if run is None:
        raise ValueError(f"The history in {folder} lacks the line that names the layers: it is damaged.")
    num_layers = len(run["layers"])
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 6), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(2, 2, width_ratios=(3, 1))
        draw_importance(figure, figure.add_subplot(grid[0, 0]), updates, num_layers, run["config"]["update_interval"])
        draw_counts(figure.add_subplot(grid[0, 1]), steps, num_layers)
        draw_losses(figure.add_subplot(grid[1, 0]), events, updates)
        draw_final(figure.add_subplot(grid[1, 1]), updates, num_layers)
        picture = (Path(folder) if Path(folder).is_dir() else Path(folder).parent) / PICTURE_FILE
        figure.savefig(picture)
    return picture


def draw_importance(figure: Figure, axes: Any, updates: list[dict[str, Any]], num_layers: int, interval: int) -> None:
    """What the policy sees of all layers after each update, `sigmoid(I)`, as a map."""
    axes.set(title="Importance over time", xlabel="optimizer step", ylabel="layer")
    if not updates:
        axes.text(0.5, 0.5, "no importance was measured", ha="center", transform=axes.transAxes)
        return
    image = axes.imshow(
        [[sigmoid(update["importance"][layer]) for update in updates] for layer in range(num_layers)],
        aspect="auto",
        origin="lower",
        cmap="RdBu_r",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(updates[0]["step"] - interval / 2, updates[-1]["step"] + interval / 2, -0.5, num_layers - 0.5),
    )
    figure.colorbar(image, ax=axes, label="sigmoid(I)", pad=0.01)


def sigmoid(score: float) -> float:
    """`1 / (1 + exp(−score))`, for scores of any size."""
    return 0.5 * (1 + math.tanh(score / 2))


def draw_counts(axes: Any, steps: list[dict[str, Any]], num_layers: int) -> None:
    """How often each layer was trained."""
    counts = [0] * num_layers
    for step in steps:
        for layer in step["active"]:
            counts[layer] += 1
    axes.barh(range(num_layers), [count / len(steps) for count in counts], color="0.5")
    axes.axvline(sum(counts) / len(steps) / num_layers, color="tab:red", linewidth=1)
    axes.set(title="Share of steps trained", xlabel="red: a uniform choice", ylim=(-0.5, num_layers - 0.5))


def draw_losses(axes: Any, events: list[dict[str, Any]], updates: list[dict[str, Any]]) -> None:
    """Training, validation and probe losses in nats."""
    logs = [event for event in events if event["event"] == "log"]
    for name, key, marker in (("training", "loss", ""), ("validation", "eval_loss", "o")):
        points = [(event["step"], event[key]) for event in logs if key in event]
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, label=name)
    means = [
        (update["step"], sum(update["losses"]) / len(update["losses"]))
        for update in updates
        if None not in update["losses"]
    ]
    if means:
        axes.plot(*zip(*means, strict=True), color="0.7", linewidth=1, label="probe, some layers suppressed")
    axes.set(title="Loss", xlabel="optimizer step", ylabel="nats a token")
    if axes.has_data():
        axes.legend(frameon=False)


def draw_final(axes: Any, updates: list[dict[str, Any]], num_layers: int) -> None:
    """Scores after the last update."""
    scores = updates[-1]["importance"] if updates else [0.0] * num_layers
    colors = ["tab:red" if score > 0 else "tab:blue" for score in scores]
    axes.barh(range(num_layers), scores, color=colors)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set(title="Importance at the end", xlabel="I", ylim=(-0.5, num_layers - 0.5))
