"""What trainings came to know of the layers: how often each was trained, and whether the scores agree with anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from ist.experiments.statistics import kendall_tau, mean
from pages import markdown

from .figures import Comparison

__all__ = ["importance_section", "layer_section"]

SHOWN = 8
"""Layers of a fixed set."""


def layer_section(comparisons: Sequence[Comparison], lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """For every method with scores how often layers were trained, and how its scores agree (Kendall's tau)."""
    for comparison in comparisons:
        measured = [line["importance"] for line in importances(lines) if comparable(line, comparison)]
        rows = []
        for method in comparison.methods():
            runs = comparison.runs(method)
            scores = [line["scores"] for line in runs if line.get("scores")]
            if len(scores) < 2:
                continue
            shares = [[count / line["steps"] for count in line["choices"]] for line in runs]
            rows.append(
                (
                    method,
                    f"{100 * mean([*map(min, shares)]):.1f}",
                    f"{100 * mean([*map(max, shares)]):.1f}",
                    show_taus([kendall_tau(one, other) for one, other in combinations(scores, 2)]),
                    show_taus([kendall_tau(one, other) for one in scores for other in measured]),
                )
            )
        if rows:
            yield f"**{comparison.task}, {comparison.length}.**"
            header = (
                "method",
                "layer trained least, % of steps",
                "most, %",
                "scores of two seeds agree, tau",
                "scores and measured importance agree, tau",
            )
            yield markdown(header, rows)


def importance_section(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """How the importance that fixed sets are chosen by is spread, and how two measurements of it agree."""
    found = importances(lines)
    for line in found:
        values = sorted(line["importance"])
        yield (
            f"- {line['task']}, batches of {line['setting']['batch_size']} rows: without the response of one layer the "
            f"validation loss rises by {values[0]:+.4f} to {values[-1]:+.4f} nats, by {values[len(values) // 2]:+.4f} "
            f"in the middle of {len(values)} layers ({line['file']})."
        )
    for one, other in combinations(found, 2):
        if one["task"] == other["task"]:
            both = len({*first(one["importance"])} & {*first(other["importance"])})
            tau = kendall_tau(one["importance"], other["importance"])
            yield (
                f"- {one['task']}: the rankings by batches of {one['setting']['batch_size']} and of "
                f"{other['setting']['batch_size']} rows agree with tau {show_taus([tau])}; of the {SHOWN} most "
                f"important layers they share {both}."
            )


def importances(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines with a measured importance; one of several that are alike, as where two plans measured the same."""
    found = [line for line in lines if line["kind"] == "importance" and "error" not in line]
    return [
        line
        for number, line in enumerate(found)
        if not any(
            line["task"] == other["task"] and line["importance"] == other["importance"] for other in found[:number]
        )
    ]


def comparable(line: Mapping[str, Any], comparison: Comparison) -> bool:
    """Whether a measured importance is of a comparison's model, task and batch size."""
    own = (line["model"], line["task"], line["setting"]["batch_size"])
    return own == (comparison.model, comparison.task, comparison.batch_size)


def first(values: Sequence[float]) -> list[int]:
    """The layers with the largest values."""
    return sorted(range(len(values)), key=lambda index: -values[index])[:SHOWN]


def show_taus(taus: Sequence[float | None]) -> str:
    """The mean of some rank correlations, and their range; None, of scores that order nothing, left out."""
    taus = [tau for tau in taus if tau is not None]
    spread = f" ({min(taus):+.2f} to {max(taus):+.2f})" if len(taus) > 1 else ""
    return f"{mean(taus):+.2f}{spread}" if taus else "–"
