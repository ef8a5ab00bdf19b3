"""The importance of every layer over time as lines, as in the paper's figure 4; of several runs side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ...runs.files import replacing
from ...runs.history import history_file
from .axes import number_layers, number_steps
from .canvas import STYLE, new_figure
from .pictures import sigmoid, thinned
from .run import read_run

__all__ = ["SIDE_BY_SIDE_FILE", "add_scale", "draw_layers", "draw_side_by_side", "end_labels"]

SIDE_BY_SIDE_FILE = "importance-side-by-side.png"
COLORS = "viridis"
NAMED = 3
"""Layers of the highest and of the lowest importance that are named at their lines' ends."""
GAP = 0.06
"""Between two names, as a share of the panel's height."""
COLUMNS = 2


def draw_side_by_side(folders: Sequence[str | Path]) -> Path:
    """Draw what several runs learned of their layers, one panel each, on the same scale.

    Args:
        folders: of runs, such as of one model on two tasks.

    Returns:
        The picture, in the first of the folders.

    Raises:
        ValueError: a folder holds no history, or its run learned no importance.
    """
    files = [history_file(folder) for folder in folders]
    runs = [read_run(file) for file in files]
    for file, run in zip(files, runs, strict=True):
        if not run.updates:
            raise ValueError(f"{file.parent} learned no importance to draw beside others: give runs of --method ist.")
    with matplotlib.rc_context(STYLE):
        columns = min(COLUMNS, len(runs))
        rows = math.ceil(len(runs) / columns)
        figure = new_figure(1 + 4.2 * columns, 0.4 + 2.9 * rows)
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        panels = [axes for line in grid for axes in line]
        num_layers = max(run.num_layers for run in runs)
        for axes, run, title in zip(panels, runs, titles([file.parent for file in files]), strict=False):
            updates = thinned(run.updates)
            values = [[sigmoid(update["importance"][layer]) for update in updates] for layer in range(run.num_layers)]
            draw_layers(axes, [update["step"] for update in updates], values, num_layers)
            axes.set(title=title, xlabel="optimizer step")
        for line in grid:
            line[0].set(ylabel="sigmoid(I)")
        for axes in panels[len(runs) :]:
            axes.remove()
        add_scale(figure, panels[: len(runs)], num_layers)
        picture = files[0].parent / SIDE_BY_SIDE_FILE
        with replacing(picture) as part:
            figure.savefig(part, format="png")
    return picture


def titles(folders: Sequence[Path]) -> list[str]:
    """A name for each folder, as short as keeps the names different."""
    folders = [folder.resolve() for folder in folders]
    names = [str(folder) for folder in folders]
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            break
    return names


def draw_layers(axes: Any, steps: Sequence[int], values: Sequence[Sequence[float]], num_layers: int) -> None:
    """A line for each layer, from the first (dark) to the last (light); the highest and the lowest ones are named.

    Args:
        axes: of the panel.
        steps: of the updates.
        values: by layer, then by update.
        num_layers: of the colour scale.
    """
    colors = matplotlib.colormaps[COLORS]
    for layer, line in enumerate(values):
        axes.plot(
            steps, line, color=colors(layer / max(1, num_layers - 1)), lw=1, marker="." if len(steps) == 1 else ""
        )
    number_steps(axes.xaxis)
    low, high = axes.get_ylim()
    places = end_labels([line[-1] for line in values], GAP * (high - low))
    for layer, height in places.items():
        axes.annotate(
            f"layer {layer}",
            (1, height),
            xycoords=axes.get_yaxis_transform(),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=colors(0.9 * layer / max(1, num_layers - 1)),
            annotation_clip=False,
        )


def end_labels(ends: Sequence[float], gap: float) -> dict[int, float]:
    """Which layers are named, and at what height: at their lines' ends, but at least `gap` apart.

    Args:
        ends: the last value of each layer.
        gap: least distance between two names.
    """
    order = sorted(range(len(ends)), key=lambda layer: ends[layer])
    if len(order) > 2 * NAMED:
        order = [*order[:NAMED], *order[-NAMED:]]
    heights = [ends[layer] for layer in order]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    if heights:
        excess = (heights[-1] - ends[order[-1]]) / 2  # half up, half down
        heights = [height - excess for height in heights]
    return dict(zip(order, heights, strict=True))


def add_scale(figure: Figure, panels: Sequence[Any], num_layers: int) -> None:
    """The colours of the layers, beside the panels, where there are several."""
    if num_layers > 1:
        scale = ScalarMappable(Normalize(0, num_layers - 1), matplotlib.colormaps[COLORS])
        number_layers(figure.colorbar(scale, ax=list(panels), label="layer", pad=0.02).ax.yaxis)
