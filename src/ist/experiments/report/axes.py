"""Axes that count, without ticks between whole numbers."""

from __future__ import annotations

from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

__all__ = ["LARGEST", "few_ticks", "number_layers", "number_steps", "span_layers"]

MAX_TICKS = 9
LAYER_STEPS, STEP_STEPS = [1, 2, 4, 5, 8, 10], [1, 2, 5, 10]
"""First digits of the distances between ticks."""
FEW_TICKS = 3
"""On an axis of a narrow panel."""
LARGEST = 1e100
"""Numbers beyond it come from no training, and matplotlib's own sums of them overflow."""


def number_layers(axis: Any) -> None:
    """Have an axis show layers by their indices from 0."""
    axis.set_major_locator(MaxNLocator(nbins=MAX_TICKS, steps=LAYER_STEPS, integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))


def number_steps(axis: Any) -> None:
    """Have an axis show optimizer steps, of which there are no halves."""
    axis.set_major_locator(MaxNLocator(nbins=MAX_TICKS, steps=STEP_STEPS, integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def span_layers(axes: Any, num_layers: int) -> None:
    """Have the lower axis of a panel show all layers and none beyond the last."""
    axes.set_xlim(-0.5, num_layers - 0.5)
    number_layers(axes.xaxis)


def few_ticks(axis: Any) -> None:
    """Have a narrow panel's axis show few numbers, with the power of ten of small and large ones beside them."""
    axis.set_major_locator(MaxNLocator(nbins=FEW_TICKS))
    formatter = ScalarFormatter()
    formatter.set_powerlimits((-2, 4))
    axis.set_major_formatter(formatter)
