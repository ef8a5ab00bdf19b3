"""The picture of an analysis: figure 2a of the paper, and true beside learned importance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from ..analysis import have_moved
from .axes import number_layers
from .comparison import STYLE, new_figure

__all__ = ["draw_analysis"]

ANALYSIS_PICTURE = "analysis.png"


def draw_analysis(result: Mapping[str, Any], folder: Path) -> Path:
    """Draw what `analysis.json` holds.

    Args:
        result: of `ist analyse`.
        folder: for the picture.

    Returns:
        The picture.
    """
    with matplotlib.rc_context(STYLE):
        figure = new_figure(9, 6)
        answered = any(removal["accuracy"] for removal in result["removal"].values())
        panels = figure.subplot_mosaic([["loss", "answers" if answered else "loss"], ["importance", "learned"]])
        draw_removal(panels["loss"], result["removal"], "loss", "Loss without layers", "nats a token")
        if answered:
            draw_removal(panels["answers"], result["removal"], "accuracy", "Exact match without layers", "share")
        draw_importance(panels["importance"], result)
        draw_learned(panels["learned"], result)
        picture = folder / ANALYSIS_PICTURE
        figure.savefig(picture)
    return picture


def draw_removal(axes: Any, removal: Mapping[str, Any], figure: str, title: str, label: str) -> None:
    """A figure after each removal, in both orders."""
    axes.set(title=title, xlabel="layers removed", ylabel=label)
    for name, color in (("least_first", "tab:blue"), ("most_first", "tab:red")):
        axes.plot(removal[name][figure], color=color, marker=".", label=name.replace("_", " important "))
    axes.legend(frameon=False)
    number_layers(axes.xaxis)


def draw_importance(axes: Any, result: Mapping[str, Any]) -> None:
    """The true importance of each layer with its interval."""
    importance, intervals = result["importance"], result["intervals"]
    axes.bar(range(len(importance)), importance, color="0.6")
    if intervals:
        middle = [(low + high) / 2 for low, high in intervals]
        half = [(high - low) / 2 for low, high in intervals]
        axes.errorbar(range(len(importance)), middle, half, fmt="none", ecolor="0.2", elinewidth=0.8)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set(title="True importance", xlabel="layer", ylabel="loss increase without it, nats")
    number_layers(axes.xaxis)


def draw_learned(axes: Any, result: Mapping[str, Any]) -> None:
    """Each layer's learned score over its true importance."""
    axes.set(title="Learned and true importance", xlabel="true importance, nats", ylabel="I, learned")
    if not result["learned"]:
        axes.text(0.5, 0.5, "nothing was learned", ha="center", transform=axes.transAxes)
        return
    axes.scatter(result["importance"], result["learned"], s=12, color="tab:red")
    for layer, point in enumerate(zip(result["importance"], result["learned"], strict=True)):
        axes.annotate(str(layer), point, fontsize=6, xytext=(2, 2), textcoords="offset points")
    if not have_moved(result["learned"]):
        axes.set(title="Learned importance, which never moved")
    elif (tau := result["rank_correlation"]["tau"]) is not None:
        axes.set(title=f"Learned and true importance, Kendall's tau {tau:+.2f}")
