"""What all pictures share: their style, and axes that count, without ticks between whole numbers."""

from __future__ import annotations

from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

__all__ = ["LARGEST", "STYLE", "few_ticks", "number_layers", "number_steps"]

MAX_TICKS = 9
ROUND = (1, 2, 5, 10)
"""Between two ticks, times a power of ten."""
FEW_TICKS = 3
"""On an axis of a narrow panel."""
LARGEST = 1e100
"""Numbers beyond it come from no training, and matplotlib's own sums of them overflow."""
STYLE: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
"""A `$` in a name is a dollar sign."""


def number_layers(axis: Any) -> None:
    """Have an axis show layers by their indices from 0."""
    axis.set_major_locator(MaxNLocator(nbins=MAX_TICKS, steps=ROUND, integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))


def number_steps(axis: Any) -> None:
    """Have an axis show optimizer steps, of which there are no halves."""
    axis.set_major_locator(MaxNLocator(nbins=MAX_TICKS, steps=ROUND, integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def few_ticks(axis: Any) -> None:
    """Have a narrow panel's axis show few numbers, with the power of ten of small and large ones beside them."""
    axis.set_major_locator(MaxNLocator(nbins=FEW_TICKS))
    formatter = ScalarFormatter(useMathText=True)
    formatter.set_powerlimits((-2, 4))
    axis.set_major_formatter(formatter)
