"""Figures as a table shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["percent", "show", "show_difference", "show_mean", "show_rate"]


def percent(title: str) -> bool:
    """Whether a figure with this title is a share."""
    return title.endswith("%")


def show(value: float | None, title: str, sign: bool = False) -> str:
    """A figure: shares in percent, losses with four decimals."""
    if value is None:
        return "–"
    return f"{100 * value:{'+' if sign else ''}.1f}" if percent(title) else f"{value:{'+' if sign else ''}.4f}"


def show_mean(cell: Mapping[str, Any] | None, title: str) -> str:
    """A mean and the standard deviation over seeds."""
    if cell is None:
        return "–"
    spread = "" if cell["deviation"] is None else f" ± {show(cell['deviation'], title)}"
    return f"{show(cell['mean'], title)}{spread}"


def show_difference(difference: Mapping[str, Any] | None, title: str) -> str:
    """A paired difference with its interval, bold where that lies on one side of zero."""
    if difference is None:
        return "–"
    mean = show(difference["mean"], title, sign=True)
    if difference["low"] is None:
        return mean
    text = f"{mean} [{show(difference['low'], title, True)}, {show(difference['high'], title, True)}]"
    return f"**{text}**" if difference["low"] > 0 or difference["high"] < 0 else text


def show_rate(rate: float, tried: Sequence[float]) -> str:
    """A learning rate, marked where it is at the edge of what was tried."""
    edge = len(tried) > 1 and rate in (tried[0], tried[-1])
    return f"{rate:.3g}{' (edge)' if edge else ''}"
