"""The paper's tables with ours under them where there is something."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pages import markdown

from .cells import show_mean
from .figures import Comparison

__all__ = ["paper_section"]


def paper_section(paper: Mapping[str, Any], comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Each table of the paper, with ours under it where there is something."""
    for number, table in paper["tables"].items():
        ours = table.get("ours")
        chosen = pick(comparisons, ours) if ours else None
        rows = [(f"paper: {label}", *map(paper_cell, values)) for label, values in table["rows"]]
        if ours and chosen:
            rows += our_rows(ours, chosen)
        header = (table["what"], *table["columns"])
        yield f"**Table {number} of the paper: {table['title']}.** {table['differs']} {our_source(ours, chosen)}"
        yield markdown(header, rows)


def paper_cell(value: float | str | None) -> str:
    return "–" if value is None else str(value)


def our_source(ours: Mapping[str, Any] | None, chosen: Comparison | None) -> str:
    """Where our rows come from."""
    if ours is None or chosen is None:
        return "Ours: Not measured yet."
    return (
        f"Ours: {chosen.model}, {chosen.task}, {chosen.length}, mean ± standard deviation over seeds; the intervals "
        "are in the tables above."
    )


def pick(comparisons: Sequence[Comparison], ours: Mapping[str, Any]) -> Comparison | None:
    """The comparison with most of the methods that a table needs; of equal ones the one by epochs, as in the paper."""
    methods = ours["rows"].values()
    fitting = [c for c in comparisons if c.task == ours["task"] and any(c.runs(method) for method in methods)]
    return max(fitting, key=lambda c: (sum(bool(c.runs(m)) for m in methods), bool(c.epochs)), default=None)


def our_rows(ours: Mapping[str, Any], comparison: Comparison) -> list[tuple[str, ...]]:
    """Our rows of a table of the paper, accuracies in percent; what was not run is left out."""
    table = comparison.table(list(ours["rows"].values()))
    rows = [
        (
            f"ours: {label}",
            *(
                "–"
                if figure is None
                else show_mean(table.get(figure, {}).get(method), "loss" if "loss" in figure else "%")
                for figure in ours["figures"]
            ),
        )
        for label, method in ours["rows"].items()
    ]
    return [row for row in rows if {*row[1:]} != {"–"}]
