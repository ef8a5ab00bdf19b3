"""The verdict tables of docs/results.md and of the README: a question a row, a task a column, paired differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pages import markdown

from .cells import percent, show
from .figures import FIGURES, Comparison

__all__ = ["QUESTIONS", "README_QUESTIONS", "Question", "most_trained", "short_list", "verdict_section"]

TASKS = {
    "gsm8k": "GSM8K, loss",
    "wikitext2": "WikiText-2, loss",
    "mawps": "MAWPS, exact match",
    "sst2": "SST-2, accuracy",
    "commonsense": "commonsense (3 epochs), accuracy",
}
"""Columns, and the metric of each."""
IN_EPOCHS = ("commonsense",)
"""Tasks whose short trainings teach nothing: the row is of the longer ones."""
METRICS = {
    "gsm8k": "solutions loss",
    "wikitext2": "text loss",
    "mawps": "exact answers",
    "sst2": "sentiment",
    "commonsense": "average",
}
"""The name of each metric in the result files."""


@dataclass(frozen=True)
class Question:
    """What a row asks: one method minus another, on the shortest trainings of a model."""

    text: str
    one: str
    other: str
    budget: str = "steps"


QUESTIONS = (
    Question("paper's rule (mu 100), a quarter of the layers − LoRA", "IST, mu 100", "LoRA"),
    Question("random quarter at each step − LoRA", "random", "LoRA"),
    Question("paper's rule (mu 100) − random quarter", "IST, mu 100", "random"),
    Question("fixed most important quarter − fixed random quarter", "fixed, most important", "fixed, at random"),
    Question("fixed random quarter − random quarter at each step", "fixed, at random", "random"),
    Question("paper's rule (mu 100) − LoRA, equal time", "IST, mu 100", "LoRA", "seconds"),
    Question("LISA − LoRA, equal time", "LISA", "LoRA", "seconds"),
    Question("focused half, equal parameters − LoRA", "focused, half", "LoRA"),
    Question("focused half − LoRA, equal time", "focused, half", "LoRA, time of half"),
    Question("focused third − LoRA, equal time", "focused, third", "LoRA, time of third"),
    Question("half above the lowest eighth − LoRA, equal time", "above an eighth, half", "LoRA, time above an eighth"),
    Question("half above the lowest quarter − LoRA, equal time", "above a quarter, half", "LoRA, time above a quarter"),
    Question("focused half − even half", "focused, half", "even, half"),
    Question("focused half − random half that stays", "focused, half", "random fixed, half"),
    Question("focused half − the most important half anywhere", "focused, half", "top, half"),
    Question("focused half − paper's rule (mu 100), half of the layers", "focused, half", "IST, half"),
)
"""In the order of the table; a question that a model has no trainings for is left out."""
README_QUESTIONS = tuple(
    question
    for question in QUESTIONS
    if (question.one == "IST, mu 100" and question.budget == "steps")
    or (question.one == "focused, half" and question.other in ("LoRA", "LoRA, time of half"))
)
"""What the README shows of them."""


def cell(difference: dict[str, Any] | None, task: str) -> str:
    """A difference with its 95% interval, bold where significant; `↑` where the first method is better, `↓` worse."""
    if difference is None:
        return "–"
    title = FIGURES[task][METRICS[task]]
    mean = show(difference["mean"], title, sign=True)
    if difference["low"] is None:
        return f"{mean} (one seed)"
    low, high = (show(difference[end], title, sign=True) for end in ("low", "high"))
    text = f"{mean} [{low}, {high}]"
    if difference["low"] <= 0 <= difference["high"]:
        return text
    better = (difference["mean"] > 0) == percent(title)
    return f"**{text}** {'↑' if better else '↓'}"


def asked(question: Question, of_task: Mapping[str, Comparison]) -> str:
    """The question, and how many steps LoRA gets where it has the time of another method; by task where they differ."""
    if not question.other.startswith("LoRA, time"):
        return question.text
    tasks: dict[int, list[str]] = {}
    for task, comparison in of_task.items():
        for steps in sorted({run["steps"] for run in comparison.runs(question.other)}):
            tasks.setdefault(steps, []).append(TASKS[task].split(",")[0])
    if len(tasks) == 1:
        return f"{question.text} ({next(iter(tasks))} steps)"
    parts = (f"{steps} steps on {', '.join(names)}" for steps, names in sorted(tasks.items()))
    return f"{question.text} ({'; '.join(parts)})"


def short_list(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """What the README has room for: of focused training the model with the most trainings alone."""
    trained: dict[str, int] = {}
    for comparison in comparisons:
        if comparison.focused:
            trained[comparison.named] = trained.get(comparison.named, 0) + len(comparison.lines)
    most = max(trained, key=lambda model: trained[model], default=None)
    usual = [comparison for comparison in comparisons if comparison.focused or not comparison.rows_end]
    return [comparison for comparison in usual if not comparison.focused or comparison.named == most]


def verdict_section(
    comparisons: Sequence[Comparison], questions: Sequence[Question] = QUESTIONS, short: bool = False
) -> Iterator[str]:
    """A table for each model, of the length with the most trainings on each task, and one of longer focused trainings.

    Args:
        comparisons: of all models and tasks.
        questions: rows of the tables.
        short: leave out longer trainings, and rows of which no task has more than one seed.
    """
    for of_task in tables(comparisons, longer=not short):
        tasks = [task for task in TASKS if task in of_task]
        rows = []
        for question in questions:
            found = {
                task: of_task[task].difference(question.one, question.other, METRICS[task], question.budget)
                for task in tasks
            }
            if any(difference and (not short or difference["low"] is not None) for difference in found.values()):
                rows.append((asked(question, of_task), *(cell(found[task], task) for task in tasks)))
        if rows:
            lengths = sorted({of_task[task].length for task in tasks})
            meaning = "↑ the first method is better, ↓ it is worse, both beyond chance."
            yield f"**{of_task[tasks[0]].named}**, {'; '.join(lengths)}. {meaning}"
            yield markdown(["", *(TASKS[task] for task in tasks)], rows)


def tables(comparisons: Sequence[Comparison], longer: bool) -> Iterator[dict[str, Comparison]]:
    """What stands in each table, by task."""
    for group in dict.fromkeys(comparison.group for comparison in comparisons):
        left = [
            comparison
            for comparison in comparisons
            # 250 steps teach no model the commonsense tasks: what differs there is chance.
            if comparison.group == group and bool(comparison.epochs) == (comparison.task in IN_EPOCHS)
        ]
        usual = most_trained(left)
        yield usual
        if longer:
            yield most_trained([x for x in left if x.focused and x.base_steps > usual[x.task].base_steps])


def most_trained(comparisons: Sequence[Comparison]) -> dict[str, Comparison]:
    """The comparison with the most trainings of each task."""
    found: dict[str, Comparison] = {}
    for comparison in comparisons:
        known = found.get(comparison.task)
        if known is None or len(comparison.lines) > len(known.lines):
            found[comparison.task] = comparison
    return found
