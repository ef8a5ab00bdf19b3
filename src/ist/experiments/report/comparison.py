"""Pictures of a comparison: validation losses, importance over time, and how often each layer was trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from .axes import number_layers, number_steps
from .pictures import sigmoid

__all__ = ["draw_comparison"]

STYLE: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}

Run = Mapping[str, Any]
Curve = Sequence[tuple[float, float, float]]
"""Points of step, seconds of training and validation loss."""


def draw_comparison(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what the runs of a comparison hold.

    Args:
        summary: what `compare.json` holds.
        folder: for the pictures: `losses.png` (figure 1, right), `importance.png` (figure 4), `choices.png`, and of
            runs that tune the most or least important layers only `selection.png` (figure 2b).

    Returns:
        The pictures for which there was something to draw.
    """
    runs = [run for run in summary["runs"] if run["budget"] == "steps"]
    pictures = []
    with matplotlib.rc_context(STYLE):
        for name, draw in DRAWN.items():
            figure = draw(summary["runs"] if name == "losses" else runs)
            if figure is not None:
                pictures.append(folder / f"{name}.png")
                figure.savefig(pictures[-1])
    return pictures


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that is drawn to a file."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each method, in the order in which they came."""
    methods: dict[str, list[Run]] = {}
    for run in runs:
        methods.setdefault(run["method"], []).append(run)
    return methods


def loss_curve(run: Run) -> list[tuple[float, float, float]]:
    """A run's validation losses, from before the first step to after the last one."""
    points = [(e["step"], e["step_seconds"], e["eval_loss"]) for e in run["log"] if "eval_loss" in e]
    if "loss" not in run["before"]:
        return points
    if not points or points[-1][0] < run["num_steps"]:
        points.append((run["num_steps"], run["step_seconds"], run["after"]["loss"]))
    points = [point for point in points if point[0] <= run["num_steps"]]
    return [(0, 0.0, run["before"]["loss"]), *{point[0]: point for point in points}.values()]


def draw_losses(runs: Sequence[Run]) -> Figure | None:
    """Validation loss by step and by second: the mean over seeds, and the range that they span."""
    steps = by_method([run for run in runs if run["budget"] == "steps"])
    if not any(loss_curve(run) for run in runs):
        return None
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (method, own) in enumerate(steps.items()):
        color = f"C{number % 10}"
        draw_band(left, [loss_curve(run) for run in own], 0, color, method)
        seconds = [run for run in runs if run["method"] == method and run["budget"] == "seconds"]
        draw_band(right, [loss_curve(run) for run in seconds or own], 1, color, method)
    left.set(title="Validation loss at equal steps", xlabel="optimizer step", ylabel="nats a token")
    right.set(title="The same over training time", xlabel="seconds of training")
    left.legend(frameon=False)
    number_steps(left.xaxis)
    return figure


def draw_band(axes: Any, curves: Sequence[Curve], column: int, color: str, label: str) -> None:
    """The mean of curves, with the range between the lowest and the highest, as far as all of them go."""
    curves = [curve for curve in curves if curve]
    if not curves:
        return
    end = min(curve[-1][column] for curve in curves)
    across = sorted({point[column] for curve in curves for point in curve if point[column] <= end})
    losses = [[value_at(at, curve, column) for curve in curves] for at in across]
    axes.plot(across, [sum(at) / len(at) for at in losses], color=color, marker=".", label=label)
    if len(curves) > 1:
        axes.fill_between(across, [min(at) for at in losses], [max(at) for at in losses], color=color, alpha=0.15, lw=0)


def value_at(at: float, curve: Curve, column: int) -> float:
    """The loss of a curve at a step or second, on the straight line between the points around it."""
    before = max((point for point in curve if point[column] <= at), key=lambda point: point[column], default=curve[0])
    after = min((point for point in curve if point[column] >= at), key=lambda point: point[column], default=curve[-1])
    if after[column] <= before[column]:
        return before[2]
    return before[2] + (after[2] - before[2]) * (at - before[column]) / (after[column] - before[column])


def draw_importance(runs: Sequence[Run]) -> Figure | None:
    """What the policy sees of each layer over time, `sigmoid(I)`: a panel for each method that learns, the mean over
    its seeds, a line for each layer from the first (dark) to the last (light).
    """
    learned = by_method([run for run in runs if run["importance"]])
    if not learned:
        return None
    num_layers = max(len(own[0]["importance"]["scores"][0]) for own in learned.values())
    figure = new_figure(9, 0.4 + 2.8 * len(learned))
    panels = figure.subplots(len(learned), 1, squeeze=False)[:, 0]
    colors = matplotlib.colormaps["viridis"]
    for axes, (method, own) in zip(panels, learned.items(), strict=True):
        length = min(len(run["importance"]["steps"]) for run in own)
        for layer in range(len(own[0]["importance"]["scores"][0])):
            means = [
                sum(sigmoid(run["importance"]["scores"][k][layer]) for run in own) / len(own) for k in range(length)
            ]
            axes.plot(own[0]["importance"]["steps"][:length], means, color=colors(layer / max(1, num_layers - 1)), lw=1)
        axes.set(title=f"Importance over time, {method}", xlabel="optimizer step", ylabel="sigmoid(I)")
        number_steps(axes.xaxis)
    scale = ScalarMappable(Normalize(0, num_layers - 1), colors)
    number_layers(figure.colorbar(scale, ax=list(panels), label="layer", pad=0.01).ax.yaxis)
    return figure


def draw_choices(runs: Sequence[Run]) -> Figure | None:
    """The share of steps in which each layer was trained, a row for each method, the mean over its seeds."""
    chosen = by_method([run for run in runs if run["choices"]])
    if not chosen:
        return None
    shares = [
        [
            sum(run["choices"][layer] / run["num_steps"] for run in own) / len(own)
            for layer in range(len(own[0]["choices"]))
        ]
        for own in chosen.values()
    ]
    figure = new_figure(9, 1.2 + 0.4 * len(shares))
    axes = figure.subplots()
    width = max(map(len, shares))
    image = axes.imshow(
        [row + [float("nan")] * (width - len(row)) for row in shares], aspect="auto", cmap="viridis", vmin=0, vmax=1
    )
    axes.set(title="Share of steps in which a layer was trained", xlabel="layer")
    number_layers(axes.xaxis)
    axes.set_yticks(range(len(chosen)), list(chosen))
    figure.colorbar(image, ax=axes, pad=0.01)
    return figure


def draw_selection(runs: Sequence[Run]) -> Figure | None:
    """Validation loss by the number of layers tuned, the most or the least important ones, mean and range over seeds.

    The runs are those of the recipe that `ist analyse` writes: their methods are `top-K` and `bottom-K`. All layers'
    adapters and full fine-tuning, where they were run, are lines across.
    """
    own = [run for run in runs if "loss" in run["after"]]
    curves = {name: losses_by_count(own, name) for name in ("top", "bottom")}
    if not all(curves.values()):
        return None
    figure = new_figure(4.5, 3.6)
    axes = figure.subplots()
    for color, losses, label in zip(("C0", "C1"), curves.values(), ("most", "least"), strict=True):
        counts = sorted(losses)
        means = [sum(losses[count]) / len(losses[count]) for count in counts]
        low, high = ([edge(losses[count]) for count in counts] for edge in (min, max))
        axes.plot(counts, means, color=color, marker=".", label=f"{label} important")
        if any(len(of_count) > 1 for of_count in losses.values()):
            axes.fill_between(counts, low, high, color=color, alpha=0.15, lw=0)
    for color, (method, label) in zip(("0.3", "tab:red"), LINES.items(), strict=True):
        values = [run["after"]["loss"] for run in own if run["method"] == method]
        if values:
            axes.axhline(sum(values) / len(values), color=color, linestyle="--", linewidth=1, label=label)
    axes.set(title="Tuning some layers only", xlabel="layers tuned", ylabel="validation loss, nats a token")
    number_layers(axes.xaxis)
    axes.legend(frameon=False)
    return figure


def losses_by_count(runs: Sequence[Run], name: str) -> dict[int, list[float]]:
    """The validation losses of the methods `name-K`, by K."""
    losses: dict[int, list[float]] = {}
    for run in runs:
        if match := re.fullmatch(rf"{name}-([0-9]+)", run["method"]):
            losses.setdefault(int(match[1]), []).append(run["after"]["loss"])
    return losses


LINES = {"all": "all layers' adapters", "full": "full fine-tuning"}
"""Methods that `selection.png` compares with."""

DRAWN = {
    "losses": draw_losses,
    "importance": draw_importance,
    "choices": draw_choices,
    "selection": draw_selection,
}
"""The pictures by name."""
