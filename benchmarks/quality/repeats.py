"""How far a training that is run again ends from itself: what the device's order of additions alone does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from pages import markdown

from .cells import show
from .figures import FIGURES, figures, read_folder

__all__ = ["repeat_section"]

AGAIN = "again"
"""The folder, beside the result files, with trainings that ran a second time."""


def repeat_section(results: Path, lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """By task and figure: pairs of trainings with the same rows, first weights and seeds, and how they differ."""
    first = {line["id"]: line for line in lines if "error" not in line}
    pairs = [(first[line["id"]], line) for line in read_folder(results / AGAIN) if line["id"] in first]
    rows = []
    for task, titles in FIGURES.items():
        for name, title in titles.items():
            found = [(figures(one)[name], figures(other)[name]) for one, other in pairs if one["task"] == task]
            if found:
                gaps = [abs(one - other) for one, other in found]
                rows.append((task, title, str(len(gaps)), show(mean(gaps), title), show(max(gaps), title)))
    if rows:
        files = sorted({f"{AGAIN}/{other['file']}" for _, other in pairs})
        devices = sorted({f"{other['device']}, commit {other['commit']}" for _, other in pairs})
        yield markdown(("task", "figure", "pairs", "mean difference", "largest"), rows)
        yield f"{'; '.join(devices)}; {', '.join(files)}."
