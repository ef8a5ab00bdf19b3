"""Axes that count: layers and steps are whole numbers, and have no ticks between them."""

from __future__ import annotations

from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

__all__ = ["number_layers", "number_steps"]

MAX_TICKS = 9


def number_layers(axis: Any) -> None:
    """Have an axis show layers by their indices from 0."""
    axis.set_major_locator(MaxNLocator(nbins=MAX_TICKS, integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))


def number_steps(axis: Any) -> None:
    """Have an axis show optimizer steps, of which there are no halves."""
    axis.set_major_locator(MaxNLocator(nbins=MAX_TICKS, integer=True, min_n_ticks=1))
