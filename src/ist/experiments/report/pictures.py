"""One picture of a run: importance over time or before it, which layers were trained, and the losses."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...runs.history import history_file
from .axes import number_layers, number_steps
from .focus import draw_scores, read_focus
from .run import RunHistory, read_run

__all__ = ["PICTURE_FILE", "draw_report"]

PICTURE_FILE = "importance.png"

MAX_POINTS = 2000
"""More than this picture has columns."""


def draw_report(folder: str | os.PathLike[str]) -> Path:
    """Draw the run in `folder` from its history.

    A focused run has its `focus.json` there too: then the scores over the depth take the place of those over time.

    Returns:
        The picture, `importance.png` in that folder.

    Raises:
        ValueError: the folder holds no history, one without a step, one that no run writes, or a damaged `focus.json`.
    """
    file = history_file(folder)
    run, focus = read_run(file), read_focus(file.parent)
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 6), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        if focus is None:
            draw_sampled(figure, run)
        else:
            scores, losses = figure.subplots(2, 1)
            draw_scores(scores, focus)
            draw_losses(losses, run)
        picture = file.parent / PICTURE_FILE
        figure.savefig(picture)
    return picture


def draw_sampled(figure: Figure, run: RunHistory) -> None:
    """Four panels: importance over time and at its end, how often each layer was trained, and the losses."""
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 1))
    draw_importance(figure, figure.add_subplot(grid[0, 0]), run)
    draw_counts(figure.add_subplot(grid[0, 1]), run)
    draw_losses(figure.add_subplot(grid[1, 0]), run)
    draw_final(figure.add_subplot(grid[1, 1]), run)


def draw_importance(figure: Figure, axes: Any, run: RunHistory) -> None:
    """What the policy sees of all layers after each update, `sigmoid(I)`, as a map."""
    axes.set(title="Importance over time", xlabel="optimizer step", ylabel="layer")
    number_layers(axes.yaxis)
    updates = thinned(run.updates)
    if not updates:
        axes.text(0.5, 0.5, "no importance was measured", ha="center", transform=axes.transAxes)
        axes.set(xticks=[], ylim=(-0.5, run.num_layers - 0.5))
        return
    number_steps(axes.xaxis)
    image = axes.imshow(
        0.5 * (1 + np.tanh(0.5 * np.array([update["importance"] for update in updates], dtype=float).T)),
        aspect="auto",
        origin="lower",
        cmap="RdBu_r",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(
            updates[0]["step"] - run.interval / 2,
            updates[-1]["step"] + run.interval / 2,
            -0.5,
            run.num_layers - 0.5,
        ),
    )
    figure.colorbar(image, ax=axes, label="sigmoid(I)", pad=0.01)


def thinned(points: Sequence[Any]) -> Sequence[Any]:
    """Fewer than twice `MAX_POINTS` of the points, evenly spaced: others would fall on the same columns."""
    return points[:: max(1, len(points) // MAX_POINTS)]


def sigmoid(score: float) -> float:
    """`1 / (1 + exp(−score))`, for scores of any size."""
    return 0.5 * (1 + math.tanh(score / 2))


def draw_counts(axes: Any, run: RunHistory) -> None:
    """How often each layer was trained."""
    num_layers, num_steps = run.num_layers, len(run.steps)
    counts = Counter(chain.from_iterable(step["active"] for step in run.steps))
    axes.barh(range(num_layers), [counts[layer] / num_steps for layer in range(num_layers)], color="0.5")
    axes.axvline(counts.total() / num_steps / num_layers, color="tab:red", linewidth=1)
    axes.set(
        title="Share of steps trained",
        xlabel="red: a uniform choice",
        ylabel="layer",
        xlim=(0, None),
        ylim=(-0.5, num_layers - 0.5),
    )
    number_layers(axes.yaxis)


def draw_losses(axes: Any, run: RunHistory) -> None:
    """Training, validation and probe losses in nats."""
    for name, key, marker in (("training", "loss", ""), ("validation", "eval_loss", "o")):
        points = thinned([(event["step"], event[key]) for event in run.logs if event.get(key) is not None])
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, label=name)
    means = [
        (update["step"], sum(update["losses"]) / len(update["losses"]))
        for update in thinned(run.updates)
        if update["losses"] and None not in update["losses"]
    ]
    if means:
        axes.plot(*zip(*means, strict=True), color="0.7", linewidth=1, label="probe, some layers suppressed")
    axes.set(title="Loss", xlabel="optimizer step", ylabel="nats a token")
    number_steps(axes.xaxis)
    if axes.has_data():
        axes.legend(frameon=False)


def draw_final(axes: Any, run: RunHistory) -> None:
    """Scores after the last update."""
    scores = run.updates[-1]["importance"] if run.updates else [0.0] * run.num_layers
    colors = ["tab:red" if score > 0 else "tab:blue" for score in scores]
    axes.barh(range(run.num_layers), scores, color=colors)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set(title="Importance at the end", xlabel="I", ylabel="layer", ylim=(-0.5, run.num_layers - 0.5))
    number_layers(axes.yaxis)
