"""docs/results.md from the result files alone: every comparison, the ablations, and the paper's tables beside ours."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from pages import markdown, write_section  # noqa: E402
from quality.figures import FIGURES, Comparison, compare, interval, load_lines  # noqa: E402

RESULTS = HERE / "results"
PAPER = HERE / "paper.json"
PAGE = HERE.parents[1] / "docs" / "results.md"
IST = ("IST, mu 10", "IST, mu 100", "IST, authors' rule")


def percent(title: str) -> bool:
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


def comparison_table(
    comparison: Comparison, figure: str, title: str, methods: Sequence[str], budget: str = "steps"
) -> str:
    """The methods of a comparison by one figure; empty where none has it."""
    cells = comparison.table(methods, budget).get(figure, {})
    rows = []
    for method in methods:
        runs, cell = comparison.runs(method, budget), cells.get(method)
        if cell is None:
            continue
        differences = cell["differences"]
        rows.append(
            (
                method,
                show_rate(runs[0]["learning_rate"], comparison.rates(method)),
                str(len(cell["values"])),
                show_mean(cell, title),
                show_difference(differences.get("LoRA"), title),
                show_difference(differences.get("random"), title),
                str(runs[0]["steps"]),
            )
        )
    header = ("method", "learning rate", "seeds", title, "minus LoRA [95%]", "minus random [95%]", "steps")
    return markdown(header, rows) if rows else ""


def show_rate(rate: float, tried: Sequence[float]) -> str:
    """A learning rate, marked where it is at the edge of what was tried."""
    edge = len(tried) > 1 and rate in (tried[0], tried[-1])
    return f"{rate:.3g}{' (edge)' if edge else ''}"


def origin(lines: Sequence[Mapping[str, Any]]) -> str:
    """Files, devices and commits."""
    parts = [sorted({str(line[name]) for line in lines}) for name in ("device", "commit", "file")]
    torch = sorted({line["versions"]["torch"] for line in lines})
    return f"{', '.join(parts[0])}; torch {', '.join(torch)}; commit {', '.join(parts[1])}; {', '.join(parts[2])}"


def caption(comparison: Comparison, budget: str) -> str:
    """What a comparison is of."""
    line = comparison.lines[0]
    rows, setting = line["rows"], line["setting"]
    sizes = ", ".join(f"{count} {name}" for name, count in rows.items() if name != "left_out")
    at = "at equal steps" if budget == "steps" else "at the time that LoRA takes, each timed alone on the device"
    return (
        f"**{comparison.task}, {comparison.length}, {at}.** {comparison.model}; rows: {sizes} ({rows['left_out']} "
        f"training rows left out as test or validation rows). Rank {setting['rank']}, dropout {setting['dropout']}. "
        f"{origin(comparison.lines)}."
    )


def comparison_section(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Every comparison by every figure of its task, at equal steps and at equal time."""
    for comparison in comparisons:
        for budget in ("steps", "seconds"):
            methods = comparison.methods(budget, ablations=False)
            if not methods:
                continue
            shown = list(dict.fromkeys(["LoRA", *methods])) if budget == "seconds" else methods
            tables = [
                table
                for figure, title in FIGURES[comparison.task].items()
                if (table := comparison_table(comparison, figure, title, shown, budget))
            ]
            if tables:
                yield caption(comparison, budget)
                yield from tables


def ablation_section(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """One option at a time, beside the methods that they vary."""
    for comparison in comparisons:
        varied = comparison.methods(ablations=True)
        if not varied:
            continue
        methods = [m for m in ("LoRA", "random", "IST, mu 100") if comparison.runs(m)]
        yield caption(comparison, "steps")
        for figure, title in FIGURES[comparison.task].items():
            if table := comparison_table(comparison, figure, title, [*methods, *varied]):
                yield table


def speed_section(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Seconds a step with nothing beside it, by task and method."""
    speeds = [line for line in lines if line["kind"] == "speed" and "error" not in line]
    for key in dict.fromkeys((line["model"], line["task"], line["setting"]["batch_size"]) for line in speeds):
        own = [x for x in speeds if (x["model"], x["task"], x["setting"]["batch_size"]) == key]
        reference = next((line["step_seconds"] for line in own if line["method"] == "LoRA"), None)
        rows = [
            (
                line["method"],
                f"{1e3 * line['step_seconds']:.1f}",
                f"{line['step_seconds'] / reference:.2f}" if reference else "–",
                f"{line['peak_memory_bytes'] / 2**30:.2f}" if line["peak_memory_bytes"] else "–",
            )
            for line in own
        ]
        yield f"**{key[1]}, batches of {key[2]} rows.** {key[0]}, alone on the device. {origin(own)}."
        yield markdown(("method", "ms a step", "to LoRA", "peak memory, GiB"), rows)


def failures(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What could not be trained."""
    for line in lines:
        if "error" in line:
            yield f"- {line['id']}: {line['error']} ({line['file']})"


# --- the paper's tables


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
    """Our rows of a table of the paper, accuracies in percent."""
    table = comparison.table(list(ours["rows"].values()))
    return [
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


# --- lines for `make bench-summary`


def summary_rows(comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """For every task LoRA, random and IST: mean with its interval, paired differences, files and commits."""
    rows = []
    for task, titles in FIGURES.items():
        own = [comparison for comparison in comparisons if comparison.task == task]
        if not own:
            rows.append((task, "–", "–", "not measured", "–", "–", "–", "–"))
        for comparison in own:
            for budget in ("steps", "seconds"):
                rows += summary_of(comparison, budget, *next(iter(titles.items())))
    return rows


def summary_of(comparison: Comparison, budget: str, figure: str, title: str) -> list[tuple[str, ...]]:
    """The rows of one comparison."""
    if not comparison.methods(budget):
        return []
    cells = comparison.table(IST, budget).get(figure, {})
    rows = []
    for method in ("LoRA", "random", *IST):
        if (cell := cells.get(method)) is None:
            continue
        lines = comparison.runs(method, budget)
        mean = interval(list(cell["values"].values()))
        shown = show(mean.mean, title)
        if mean.low is not None:
            shown += f" [{show(mean.low, title)}, {show(mean.high, title)}]"
        rows.append(
            (
                f"{comparison.task}, {comparison.length}{', equal time' if budget == 'seconds' else ''}",
                title,
                method,
                shown,
                *(show_difference(cell["differences"].get(other), title).strip("*") for other in ("LoRA", "random")),
                ", ".join(sorted({line["file"] for line in lines})),
                ", ".join(sorted({line["commit"] for line in lines})),
            )
        )
    return rows


SUMMARY_HEADER = ("task", "figure", "method", "mean [95%]", "minus LoRA", "minus random", "file", "commit")


def quality_summary() -> list[tuple[str, ...]]:
    """The rows of the results in the repository."""
    return summary_rows(compare(load_lines(RESULTS)))


def sections(lines: Sequence[Mapping[str, Any]], paper: Mapping[str, Any]) -> dict[str, list[str]]:
    """What goes between the marks of the page."""
    comparisons = compare(lines)
    measured = [row for row in summary_rows(comparisons) if row[2] != "–"]
    return {
        "quality summary": [markdown(SUMMARY_HEADER, measured)] if comparisons else [],
        "quality": [*comparison_section(comparisons)],
        "quality ablations": [*ablation_section(comparisons)],
        "quality speed": [*speed_section(lines)],
        "quality paper": [*paper_section(paper, comparisons)],
        "quality failures": ["\n".join(failures(lines)) or "None."] if lines else [],
    }


def main(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Fill the page."""
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
    for name, tables in sections(load_lines(results), paper).items():
        write_section(name, tables, page)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
