"""The picture of a focused run: the score of each layer over the depth, which ones were chosen, and the losses."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.patches import Patch

from ...runs.files import FOCUS_FILE
from .axes import LARGEST, span_layers
from .run import MAX_LAYERS

__all__ = ["FocusScores", "draw_scores", "read_focus"]


@dataclass(frozen=True)
class FocusScores:
    """What `focus.json` says of the layers."""

    num_layers: int
    chosen: tuple[int, ...]
    """The layers that have adapters."""
    scores: tuple[float, ...] | None
    """The importance of each; None for an even spread."""
    criterion: str


def read_focus(folder: Path) -> FocusScores | None:
    """What a run's `focus.json` says, or None where it is not a focused run.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / FOCUS_FILE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        num = len(found["names"])
        chosen = tuple(int(layer) for layer in found["layers"])
        scores = None if found["scores"] is None else tuple(float(score) for score in found["scores"])
        criterion = str(found.get("criterion"))
        fits = 0 < num <= MAX_LAYERS and all(0 <= layer < num for layer in chosen) and len(scores or chosen) <= num
        if scores is not None:
            fits = fits and len(scores) == num and all(abs(score) <= LARGEST for score in scores)
        if not fits or not re.fullmatch(r"\w{1,40}", criterion):
            raise ValueError("its layers and scores do not fit together")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}): it is not what a focused run writes.") from error
    return FocusScores(num, chosen, scores, criterion)


def draw_scores(axes: Any, focus: FocusScores) -> None:
    """A bar for each layer over the depth, the chosen ones in red; without scores all bars are of one height."""
    heights = focus.scores or (1.0,) * focus.num_layers
    colors = ["tab:red" if layer in focus.chosen else "0.75" for layer in range(focus.num_layers)]
    axes.bar(range(focus.num_layers), heights, color=colors)
    axes.set(title="Importance before training", xlabel="layer", ylabel=f"score ({focus.criterion})")
    if focus.scores is None:
        axes.set(title="Evenly spread, nothing measured", ylabel="", yticks=[])
    span_layers(axes, focus.num_layers)
    named = [Patch(color="tab:red", label="has adapters"), Patch(color="0.75", label="has none")]
    axes.legend(handles=named, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2)
