"""How far a training that is run again ends from itself: by the device's order of additions, and by later code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from statistics import mean
from typing import Any

from pages import markdown

from .cells import show, show_difference
from .figures import FIGURES, figures, interval, read_folder

__all__ = ["repeat_section"]

AGAIN = "again"
"""The folder, beside the result files, with the other run of trainings that ran twice."""
VERDICTS = {("focused, half", "LoRA"), ("focused, half", "LoRA, time of half")}
"""A method and what it is compared with, where all trainings of both ran twice."""

Pair = tuple[Mapping[str, Any], Mapping[str, Any]]
"""The run of a training that is in the tables, and the other one."""


def repeat_section(results: Path, lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """By task and figure: pairs of trainings with the same rows, first weights and seeds, and how they differ."""
    first = {key_of(line): line for line in lines if "error" not in line}
    pairs = [(first[key_of(line)], line) for line in read_folder(results / AGAIN) if key_of(line) in first]
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
    if verdicts := [*differences(pairs)]:
        yield markdown(
            ("task", "difference", "seeds", "of the tables", "of the other run", "of both, averaged"), verdicts
        )


def key_of(line: Mapping[str, Any]) -> tuple[str, ...]:
    """What is the same of two runs of one training."""
    return line["model"], line.get("rows_end", ""), line["id"]


def differences(pairs: Sequence[Pair]) -> Iterator[tuple[str, ...]]:
    """By task and methods: the difference by either run, and by the mean of both."""
    by_method: dict[tuple[str, str, str], dict[int, Pair]] = {}
    for one, other in pairs:
        by_method.setdefault((one["model"], one["task"], one["method"]), {})[one["seed"]] = (one, other)
    for (model, task, method), (*other, against) in permutations(by_method, 2):
        if other != [model, task] or (method, against) not in VERDICTS:
            continue
        name, title = next(iter(FIGURES[task].items()))
        mine, theirs = by_method[model, task, method], by_method[model, task, against]
        gaps = [
            [figures(a)[name] - figures(b)[name] for a, b in zip(mine[seed], theirs[seed], strict=True)]
            for seed in sorted(mine.keys() & theirs.keys())
        ]
        runs = [[one for one, _ in gaps], [other for _, other in gaps], [mean(both) for both in gaps]]
        shown = [show_difference(vars(interval(run)), title) for run in runs]
        yield (f"{task}: {title}", f"{method} − {against}", str(len(gaps)), *shown)
