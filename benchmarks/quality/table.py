"""RESULTS.md from the result files alone: every comparison, the ablations, and the paper's tables beside ours; and the
verdict table of docs/results.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from pages import markdown, write_section  # noqa: E402
from quality.cells import show, show_difference, show_mean, show_rate  # noqa: E402
from quality.figures import AGAINST, FIGURES, Comparison, compare, figures, interval, load_lines, read_folder  # noqa: E402
from quality.focused import focused_section  # noqa: E402
from quality.layers import importance_section, layer_section  # noqa: E402
from quality.paper import paper_section  # noqa: E402
from quality.plan import final_loss  # noqa: E402
from quality.questions import question_section  # noqa: E402
from quality.repeats import repeat_section  # noqa: E402
from quality.scaling import scaling_section  # noqa: E402
from quality.verdict import README_QUESTIONS, short_list, verdict_section  # noqa: E402

RESULTS = HERE / "results"
PAPER = HERE / "paper.json"
COMMONEST: dict[str, dict[str, float]] = json.loads((HERE / "commonest.json").read_text(encoding="utf-8"))
"""By task what always giving a test's commonest answer gets, from `commonest.py`."""
PAGE = HERE / "RESULTS.md"
"""Every comparison."""
SUMMARY_PAGE = HERE.parents[1] / "docs" / "results.md"
"""The verdicts."""
README = HERE.parents[1] / "README.md"
"""A few of them."""
ORDINALS = ("lowest rate", "second", "third", "fourth", "fifth", "sixth", "seventh")
IST = ("IST, mu 10", "IST, mu 100", "IST, authors' rule")


def comparison_table(
    comparison: Comparison, figure: str, title: str, methods: Sequence[str], budget: str = "steps"
) -> str:
    """The methods of a comparison by one figure; empty where none has it."""
    cells = comparison.table(methods, budget).get(figure, {})
    columns: dict[str, list[str]] = {}
    for method in methods:
        runs, cell = comparison.runs(method, budget), cells.get(method)
        if cell is None:
            continue
        row = {
            "method": method,
            "learning rate": show_rate(runs[0]["learning_rate"], comparison.rates(method)),
            "steps": str(runs[0]["steps"]),
            "seeds": str(len(cell["values"])),
            title: show_mean(cell, title),
            **{f"minus {x}": show_difference(cell["differences"].get(x), title) for x in AGAINST},
        }
        for name, text in row.items():
            columns.setdefault(name, []).append(text)
    empty = [name for name in columns if name.startswith("minus ") and {*columns[name]} == {"–"}]
    alike = [name for name in ("steps", "seeds") if len({*columns.get(name, [])}) == 1]
    shown = {name: texts for name, texts in columns.items() if name not in (*empty, *alike)}
    return markdown([*shown], zip(*shown.values(), strict=True)) if shown else ""


def origin(lines: Sequence[Mapping[str, Any]]) -> str:
    """Files, devices and commits."""
    parts = [sorted({str(line[name]) for line in lines}) for name in ("device", "commit", "file")]
    torch = sorted({line["versions"]["torch"] for line in lines})
    return f"{', '.join(parts[0])}; torch {', '.join(torch)}; commit {', '.join(parts[1])}; {', '.join(parts[2])}"


def caption(comparison: Comparison, budget: str) -> str:
    """What a comparison is of."""
    line = comparison.lines[0]
    rows, setting = line["rows"], line["setting"]
    named = {name.replace("exact answers", "exact match"): count for name, count in rows.items() if name != "left_out"}
    sizes = ", ".join(f"{count} {name}" for name, count in named.items())
    at = "at equal steps" if budget == "steps" else "at the time that LoRA takes, each timed alone on the device"
    compiled = sum(bool(line.get("compiled")) for line in comparison.lines)
    seeds = sorted({len(comparison.runs(method, budget)) for method in comparison.methods(budget)})
    return (
        f"**{comparison.task}, {comparison.length}, {at}.** {comparison.named}; rows: {sizes} ({rows['left_out']} "
        f"training rows left out as test or validation rows). Rank {setting['rank']}, dropout {setting['dropout']}. "
        f"{' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds. {commonest(comparison.task)}"
        f"{f'{compiled} of {len(comparison.lines)} trainings with compiled layers. ' if compiled else ''}"
        f"{origin(comparison.lines)}."
    )


def commonest(task: str) -> str:
    """What to beat; nothing for tasks without options."""
    if task not in COMMONEST:
        return ""
    return f"Always giving the commonest answer of a test gets {show(COMMONEST[task]['average'], '%')}%. "


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


def rate_section(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Every learning rate that was tried with the first seed: validation loss and first figure."""
    for comparison in comparisons:
        figure, title = next(iter(FIGURES[comparison.task].items()))
        rows = []
        for method in comparison.methods(ablations=False):
            chosen = comparison.runs(method)[0]["learning_rate"]
            cells = []
            for line in comparison.tried(method):
                value = show(figures(line).get(figure), title)
                text = f"{line['learning_rate']:.3g}: {show(final_loss(line), 'loss')}, {value}"
                cells.append(f"**{text}**" if line["learning_rate"] == chosen else text)
            rows.append((method, *cells))
        width = max(map(len, rows), default=0) - 1
        yield (
            f"**{comparison.task}, {comparison.length}, the first seed.** Learning rate: validation loss, {title}. The "
            "chosen rate is bold."
        )
        header = ("method", *ORDINALS[:width])
        yield markdown(header, [(*row, *["–"] * (len(header) - len(row))) for row in rows])


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
                " and ".join(f"{1e3 * seconds:.0f}" for seconds in line["times"]),
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


def sections(results: Path, paper: Mapping[str, Any]) -> dict[str, list[str]]:
    """What goes between the marks of the page."""
    lines = load_lines(results)
    comparisons = compare(lines)
    measured = [row for row in summary_rows(comparisons) if row[2] != "–"]
    return {
        "quality focused": [*focused_section(comparisons)],
        "quality scaling": [*scaling_section(read_folder(results))],
        "quality questions": [*question_section(comparisons)],
        "quality summary": [markdown(SUMMARY_HEADER, measured)] if comparisons else [],
        "quality": [*comparison_section(comparisons)],
        "quality rates": [*rate_section(comparisons)],
        "quality layers": [*layer_section(comparisons, lines), "\n".join(importance_section(lines))],
        "quality ablations": [*ablation_section(comparisons)],
        "quality repeats": [*repeat_section(results, lines)],
        "quality speed": [*speed_section(lines)],
        "quality paper": [*paper_section(paper, comparisons)],
        "quality failures": ["\n".join(failures(lines)) or "None."] if lines else [],
    }


def main(results: Path = RESULTS, page: Path = PAGE, summary: Path = SUMMARY_PAGE, readme: Path = README) -> None:
    """Fill the pages."""
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
    comparisons = compare(load_lines(results))
    write_section("quality verdict", [*verdict_section(comparisons)], summary)
    short = verdict_section(short_list(comparisons), README_QUESTIONS, short=True)
    write_section("quality short", [*short], readme)
    for name, tables in sections(results, paper).items():
        write_section(name, tables, page)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
