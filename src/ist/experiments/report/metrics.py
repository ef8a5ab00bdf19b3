"""The picture of a comparison's metrics: each run's figure, and the mean of each method."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..comparison import is_share
from .canvas import Run, by_method, new_figure

__all__ = ["draw_metrics"]


def draw_metrics(runs: Sequence[Run]) -> Figure | None:
    """A panel for each figure that is no loss, a row for each method: a dot for each seed, a bar at the mean."""
    methods = by_method(runs)
    names = list(dict.fromkeys(name for run in runs for name in run["figures"] if not name.endswith("loss")))
    if not names:
        return None
    figure = new_figure(max(4.5, 1 + 3 * len(names)), 1.2 + 0.35 * len(methods))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for row, own in enumerate(methods.values()):
            values = [run["figures"][name] for run in own if name in run["figures"]]
            if values:
                color = f"C{row % 10}"
                axes.scatter(values, [row] * len(values), s=20, color=color, alpha=0.7, lw=0)
                mean = sum(values) / len(values)
                axes.plot([mean, mean], [row - 0.25, row + 0.25], color=color, lw=2)
        axes.set(title=name[:1].upper() + name[1:])
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        if is_share(name):
            axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    panels[0].set_yticks(range(len(methods)), list(methods))
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    figure.supxlabel("a dot for each seed, a bar at the mean", fontsize=8, color="0.4")
    return figure
