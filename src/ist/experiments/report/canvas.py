"""What all pictures share: their style, an empty figure, and the runs of a comparison by method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["STYLE", "Run", "by_method", "new_figure"]

STYLE: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
"""matplotlib's settings; a `$` in a name is a dollar sign."""

Run = Mapping[str, Any]
"""A run as `compare.json` holds it."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that is drawn to a file; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each method, in the order in which they came."""
    methods: dict[str, list[Run]] = {}
    for run in runs:
        methods.setdefault(run["method"], []).append(run)
    return methods
