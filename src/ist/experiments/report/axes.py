"""Axes that count: layers and steps are whole numbers, and have no ticks between them."""

from __future__ import annotations

from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

__all__ = ["number_layers", "number_steps", "span_layers"]

MAX_TICKS = 9
LAYER_STEPS, STEP_STEPS = [1, 2, 4, 5, 8, 10], [1, 2, 5, 10]
"""First digits of the distances between ticks."""


def number_layers(axis: Any) -> None:
    """Have an axis show layers by their indices from 0."""
    axis.set_major_locator(MaxNLocator(nbins=MAX_TICKS, steps=LAYER_STEPS, integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))


def number_steps(axis: Any) -> None:
    """Have an axis show optimizer steps, of which there are no halves."""
    axis.set_major_locator(MaxNLocator(nbins=MAX_TICKS, steps=STEP_STEPS, integer=True, min_n_ticks=1))


def span_layers(axes: Any, num_layers: int) -> None:
    """Have the lower axis of a panel show all layers and none beyond the last."""
    axes.set_xlim(-0.5, num_layers - 0.5)
    number_layers(axes.xaxis)
